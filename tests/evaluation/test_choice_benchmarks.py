"""ScienceQA, SEED-Bench, Q-Bench, MMMU, MMBench's submission: files, prompts, rules, damaged input."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.extraction import rules
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.report import Report
from llava_npu.evaluation.run import EvaluationOptions, evaluate
from support.benchmark_samples import LETTER, qbench, scienceqa, seedbench, write_json
from support.evaluation_samples import (
    COLUMNS,
    FakeAnswerer,
    circular_rows,
    encoded_image,
    knows,
    plain_image,
    question_row,
    write_tsv,
)


def run(name: str, data: Path, tmp_path: Path, respond: Callable[[Question], str] = knows) -> Report:
    return evaluate(name, data, FakeAnswerer(respond), tmp_path / "out")


def value(report: Report, metric: str, rule: str = "strict", name: str = "overall") -> float:
    (found,) = [s for s in report.scores if (s.metric, s.extraction, s.name) == (metric, rule, name)]
    return found.value


# --- letters ----------------------------------------------------------------------------------------------------------

OPTIONS = dict(zip("ABC", ("x", "y", "z"), strict=True))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("B. y", "B"),
        ("B.y", None),
        (" B", None),
        ("The answer is B.", "B"),
        ("So The answer is By", "B"),  # the dot of the pattern matches anything
        ("The answer is B", None),  # and something must be there
        ("The answer is A. The answer is B.", None),
        ("D", None),  # no such option
        ("", None),
        ("b", None),
    ],
)
def test_scienceqa_rule(answer: str, expected: str | None) -> None:
    assert rules.scienceqa(answer, OPTIONS) == expected


@given(st.text(max_size=20))
def test_letters_are_options_or_nothing(answer: str) -> None:
    for rule in (rules.scienceqa, rules.exact):
        assert rule(answer, OPTIONS) in (*OPTIONS, None)


# --- ScienceQA --------------------------------------------------------------------------------------------------------


def test_scienceqa_both_accuracies(tmp_path: Path) -> None:
    data = scienceqa(tmp_path, [True, True, False, False])
    report = run("scienceqa", data, tmp_path, lambda q: f"The answer is {q.answer}." if q.id != "2" else "E")
    for rule in ("strict", "llava", "vlmevalkit"):
        assert value(report, "accuracy", rule) == 0.75
        assert value(report, "IMG accuracy", rule) == 0.5
    assert value(report, "accuracy", name="physics") == 0.75
    assert "1 of the 5 problems of split 'test' are not in the question file (999, …)" in " ".join(report.notes)


def test_scienceqa_prompt(tmp_path: Path) -> None:
    # Reference: LLaVA's model_vqa_science.py with --single-pred-prompt.
    seen, unseen = get("scienceqa").read(scienceqa(tmp_path, [True, False])).questions
    text = "What is 1?\nContext: none\nOptions: (A) option 0 (B) option 1 (C) option 2"
    assert seen.prompt == f"{text}\n{LETTER}"
    assert seen.images[0].open().size == (8, 8)
    assert unseen.images == ()
    assert (seen.answer, unseen.answer) == ("B", "C")


def test_scienceqa_img_asks_only_what_has_a_image(tmp_path: Path) -> None:
    report = run("scienceqa_img", scienceqa(tmp_path, [True, False, True]), tmp_path)
    assert report.num_questions == 2
    assert {score.metric for score in report.scores} == {"accuracy"}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("problems.json", '"answer": 1', '"answer": 7', "record '1', field 'answer': 7 is not the place of one"),
        ("problems.json", '"1": {', '"one": {', "record 1, field 'id': '1' is not in problems.json"),
        ("llava_test_CQM-A.json", '"id": "2"', '"id": "1"', "record 2, field 'id': '1' is there twice"),
        ("llava_test_CQM-A.json", '"image": "1/', '"image": "../../1/', "field 'image': .* leads out of the"),
        ("llava_test_CQM-A.json", '"conversations"', '"talk"', "field 'conversations': a list of objects is expected"),
        ("llava_test_CQM-A.json", "[", "", "not valid JSON"),
    ],
)  # fmt: skip
def test_scienceqa_damaged(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    data = scienceqa(tmp_path, [True, False])
    path = data.parent / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        get("scienceqa").read(data)


def test_scienceqa_without_its_problems(tmp_path: Path) -> None:
    data = scienceqa(tmp_path, [False])
    (data.parent / "problems.json").unlink()
    with pytest.raises(UserError, match=r"needs ScienceQA's problems\.json next to it"):
        get("scienceqa").read(data)


# --- SEED-Bench -------------------------------------------------------------------------------------------------------


def test_seedbench_images_only(tmp_path: Path) -> None:
    report = run("seedbench", seedbench(tmp_path), tmp_path, lambda q: "A" if q.id == "0" else "C. thing c")
    assert report.num_questions == 2
    assert value(report, "vanilla") == 1
    assert value(report, "vanilla", "llava") == 0.5  # nothing but the letter
    assert value(report, "vanilla", "llava", "Scene Understanding") == 1
    assert "1 questions about videos are left out" in " ".join(report.notes)
    lines = (tmp_path / "out" / "submission" / "seed_bench.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"question_id": "1", "prediction": "C. thing c"}


def test_seedbench_damaged(tmp_path: Path) -> None:
    data = seedbench(tmp_path)
    whole = data.parent / "SEED-Bench.json"
    whole.write_text(whole.read_text().replace('"answer": "C"', '"answer": "E"'))
    with pytest.raises(UserError, match=r"questions 2, field 'answer': 'E' is none of the choices"):
        get("seedbench").read(data)


# --- Q-Bench ----------------------------------------------------------------------------------------------------------


def test_qbench_prompts(tmp_path: Path) -> None:
    # Reference: model_vqa_qbench.py, which LLaVA's scripts call and do not have.
    first, second = get("qbench").read(qbench(tmp_path)).questions
    assert first.prompt == "How sharp is it?\nChoose between one of the options as follows:\nA. Sharp\nB. Blurred\n"
    assert (first.answer, second.answer) == ("B", None)
    assert (first.category, first.l2_category) == ("how", "distortion")
    chinese = get("qbench_cn").read(qbench(tmp_path, "质衡-问答-验证集.json")).questions[0]
    assert chinese.prompt.startswith("How sharp is it?\\在下列选项中选择一个:\nA. Sharp\n")


def test_qbench_submission_keeps_the_records(tmp_path: Path) -> None:
    report = run("qbench", qbench(tmp_path), tmp_path, lambda question: "B. Blurred")
    assert value(report, "vanilla") == 1
    lines = (tmp_path / "out" / "submission" / "llvisionqa_dev_answers.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["correct_ans"] == "Blurred"
    assert json.loads(lines[1]) == {**json.loads(lines[1]), "img_path": "a.png", "response": "B. Blurred"}


def test_chinese_qbench_submission_has_the_name_of_llavas_script(tmp_path: Path) -> None:
    # Reference: LLaVA's scripts/v1_5/eval/qbench_zh.sh.
    evaluate(
        "qbench_cn", qbench(tmp_path, "质衡-问答-测试集.json"), FakeAnswerer(lambda question: "A"), tmp_path / "out"
    )
    (written,) = (tmp_path / "out" / "submission").iterdir()
    assert written.name == "llvisionqa_zh_test_answers.jsonl"


def test_qbench_damaged(tmp_path: Path) -> None:
    data = qbench(tmp_path)
    data.write_text(data.read_text().replace('"correct_ans": "Blurred"', '"correct_ans": "Foggy"'))
    with pytest.raises(UserError, match="record 1, field 'correct_ans': 'Foggy' is none of the candidates"):
        get("qbench").read(data)
    with pytest.raises(UserError, match="a list of objects is expected, not an object"):
        get("qbench").read(write_json(tmp_path / "x.json", {"a": 1}))


# --- MMMU, MMStar, AI2D -----------------------------------------------------------------------------------------------


def encoded(shade: int) -> str:
    buffer = io.BytesIO()
    plain_image((shade, 1, 2), size=30).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_mmmu_several_images_and_open_questions(tmp_path: Path) -> None:
    rows = [
        question_row(1, ["<image 1>", "<image 2>"], 0, image=str([encoded(1), encoded(2)]), split="validation"),
        {"index": 2, "question": "How many?", "answer": "24/7", "image": encoded(3), "split": "validation"},
        {"index": 3, "question": "How many?", "answer": "5", "image": encoded(3), "split": "dev"},
    ]
    data = write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", rows)
    several, open_, _ = get("mmmu").read(data).questions
    assert len(several.images) == 2
    assert several.prompt.endswith(f"A. <image 1>\nB. <image 2>\n{LETTER}")
    assert open_.prompt == "How many?\nAnswer the question directly."
    report = run("mmmu", data, tmp_path, lambda q: {"1": "A", "2": "24/7.", "3": "It is 5"}[q.id])
    scores = {(s.split, s.extraction): s.value for s in report.scores if (s.level, s.metric) == ("overall", "vanilla")}
    assert scores == {
        ("validation", "strict"): 1,
        ("validation", "vlmevalkit"): 1,
        ("validation", "mmmu"): 1,
        ("dev", "mmmu"): 1,
        ("dev", "strict"): 0,
        ("dev", "vlmevalkit"): 1,
    }


@pytest.mark.parametrize("name", ["mmstar", "ai2d", "multiple_choice"])
def test_rows_without_options_are_an_error_elsewhere(tmp_path: Path, name: str) -> None:
    row = {"index": 2, "question": "How many?", "answer": "24", "image": encoded(3)}
    with pytest.raises(UserError, match=r"row 1 \(line 2\), column 'A': empty; a question needs at least"):
        get(name).read(write_tsv(tmp_path / "x.tsv", [row]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("['abc', ", "begins with '\\[' but is not a list"),
        ("[{}]", "is not a list of strings"),
        ("['999']", "'999' is neither an image in base64 nor the index"),
    ],
)
def test_damaged_list_of_images(tmp_path: Path, image: str, message: str) -> None:
    data = write_tsv(tmp_path / "x.tsv", [question_row(1, ["a", "b"], 0, image=image)])
    with pytest.raises(UserError, match=f"column 'image': {message}"):
        get("mmmu").read(data)


def test_mmstar_categories(tmp_path: Path) -> None:
    columns = ("index", "question", "A", "B", "answer", "category", "l2_category", "image")
    row = {"index": 0, "question": "What?", "A": "x", "B": "y", "answer": "A", "category": "math"}
    data = write_tsv(
        tmp_path / "MMStar.tsv", [{**row, "l2_category": "geometry", "image": encoded_image((1, 1, 1))}], columns
    )
    report = run("mmstar", data, tmp_path)
    assert value(report, "vanilla", name="geometry") == value(report, "vanilla", name="math") == 1


# --- MMBench's submission ---------------------------------------------------------------------------------------------


def test_mmbench_spreadsheet(tmp_path: Path) -> None:
    # Reference: LLaVA's convert_mmbench_for_submission.py.
    openpyxl = pytest.importorskip("openpyxl")
    columns = (*COLUMNS[:8], "category", "source", "comment", "l2-category", "split", "image")
    rows = [{**row, "answer": "", "source": "s", "comment": "c", "split": "test"} for row in circular_rows(groups=2)]
    data = write_tsv(tmp_path / "MMBench_TEST_EN.tsv", rows, columns)
    report = run("mmbench_test", data, tmp_path, lambda question: "=1+1\x07 A" if question.id == "1" else "B")
    assert report.scores == ()
    book = openpyxl.load_workbook(tmp_path / "out" / "submission" / "MMBench_TEST_EN.xlsx")
    header, first, *rest = book.active.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert first == (1, "What is in image 1?", "thing 1", "other 1B", "other 1C", "other 1D", "=1+1 A", None, "test")
    assert book.active["G2"].data_type == "s"  # a text, not a formula
    assert [row[0] for row in rest] == [int(str(row["index"])) for row in rows[1:]]


def test_no_submission_of_a_baseline(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "MMBench_DEV_EN.tsv", circular_rows(groups=2))
    evaluate("mmbench", data, FakeAnswerer(knows), tmp_path / "out", EvaluationOptions(images="none"))
    assert not (tmp_path / "out" / "submission").exists()
