"""POPE, MME and HallusionBench: files, pairing, metrics, submission files, damaged input."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.report import Report
from llava_npu.evaluation.run import EvaluationOptions, evaluate
from support.benchmark_samples import POPE_CATEGORIES, SHORT, mme, pope, write_jsonl
from support.evaluation_samples import FakeAnswerer, encoded_image, knows, write_tsv

BALANCED = [["yes", "no"] * 3] * 3
TASKS = {"existence": 2, "artwork": 2, "code_reasoning": 1}


def run(name: str, data: Path, tmp_path: Path, respond: Callable[[Question], str] = knows) -> Report:
    return evaluate(name, data, FakeAnswerer(respond), tmp_path / "out", EvaluationOptions(batch_size=7))


def value(report: Report, metric: str, rule: str = "strict", name: str = "overall") -> float:
    (found,) = [s for s in report.scores if (s.metric, s.extraction, s.name) == (metric, rule, name)]
    return found.value


# --- POPE -------------------------------------------------------------------------------------------------------------


def test_pope_prompt_and_right_answers(tmp_path: Path) -> None:
    report = run("pope", pope(tmp_path, BALANCED), tmp_path)
    assert report.num_questions == 18
    for rule in ("strict", "llava", "vlmevalkit"):
        assert value(report, "F1", rule) == value(report, "mean F1", rule) == 1
        assert value(report, "yes ratio", rule) == 0.5
        assert value(report, "accuracy", rule, "popular") == 1
    first = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["prompt"].endswith(f"in the image?\n{SHORT}")


def test_pope_labels_are_found_in_any_order(tmp_path: Path) -> None:
    data = pope(tmp_path, BALANCED)
    for category in POPE_CATEGORIES:
        path = data.parent / "coco" / f"coco_pope_{category}.json"
        lines = path.read_text().splitlines()
        random.Random(0).shuffle(lines)
        path.write_text("\n".join(lines))
    assert value(run("pope", data, tmp_path), "accuracy") == 1


def test_pope_says_which_labels_were_not_asked(tmp_path: Path) -> None:
    data = pope(tmp_path, BALANCED)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    (note,) = get("pope").read(data).notes
    assert note.startswith("1 labelled questions of category adversarial are not in the question file")


@settings(max_examples=25)
@given(st.data())
def test_pope_metrics_by_definition(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    pairs = st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=6)
    drawn = [data.draw(pairs) for _ in range(2)]
    folder = tmp_path_factory.mktemp("pope")
    read = get("pope").read(pope(folder, [[label for label, _ in pairs] for pairs in drawn]))
    said = [answer for pairs in drawn for _, answer in pairs]
    parsed = {question.id: {"strict": answer} for question, answer in zip(read.questions, said, strict=True)}
    found = {(s.metric, s.name): s.value for s in get("pope").score(read.questions, parsed) if s.extraction == "strict"}

    def f1(pairs: list[tuple[str, str]]) -> float:
        true = sum(pair == ("yes", "yes") for pair in pairs)
        said, there = sum(answer == "yes" for _, answer in pairs), sum(label == "yes" for label, _ in pairs)
        return 2 * true / (said + there) if said + there else 0.0

    pooled = [pair for pairs in drawn for pair in pairs]
    assert found["F1", "overall"] == pytest.approx(f1(pooled))
    assert found["mean F1", "overall"] == pytest.approx(sum(map(f1, drawn)) / 2)
    assert found["F1", "popular"] == pytest.approx(f1(drawn[1]))
    assert found["accuracy", "overall"] == pytest.approx(sum(label == answer for label, answer in pooled) / len(pooled))


def test_pope_answer_that_says_nothing(tmp_path: Path) -> None:
    report = run("pope", pope(tmp_path, [["yes", "no"]] * 3), tmp_path, lambda question: "a dog")
    assert value(report, "accuracy") == 0  # strict: no answer is a wrong answer
    assert value(report, "accuracy", "llava") == 0.5  # there it is a yes
    assert value(report, "accuracy", "vlmevalkit") == 0  # there it is "unknown", and a no in F1
    assert value(report, "F1", "vlmevalkit") == 0


def test_pope_unreadable_image_is_wrong_by_every_rule(tmp_path: Path) -> None:
    data = pope(tmp_path, [["yes"], ["yes"], ["yes"]], images=1)
    next((data.parent / "val2014").iterdir()).write_bytes(b"no image")
    report = run("pope", data, tmp_path)
    assert report.num_errors == 3
    assert {s.value for s in report.scores if s.metric in ("accuracy", "F1", "mean F1")} == {0.0}


def test_pope_table_counts_a_question_in_each_of_its_categories(tmp_path: Path) -> None:
    rows = [
        {"index": 1, "question": "Is there a dog?", "answer": "Yes", "category": "popular,random"},
        {"index": 2, "question": "Is there a cat?", "answer": "No", "category": "popular"},
    ]
    rows = [{**row, "image": encoded_image((int(str(row["index"])), 2, 3))} for row in rows]
    data = write_tsv(tmp_path / "POPE.tsv", rows, ("index", "question", "answer", "category", "image"))
    report = run("pope", data, tmp_path, lambda question: "yes")
    assert value(report, "accuracy", name="random") == 1
    assert value(report, "accuracy", name="popular") == 0.5
    assert value(report, "accuracy") == pytest.approx(2 / 3)
    assert "not c12f5acb142f2ef1f85a26ba2fbe41d5 as published" in " ".join(report.notes)


def damage_label(folder: Path) -> None:
    path = folder / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"no"', '"perhaps"', 1))


def contradict_label(folder: Path) -> None:
    path = folder / "coco" / "coco_pope_random.json"
    line = path.read_text().splitlines()[0]
    path.write_text(path.read_text() + line.replace('"yes"', '"no"') + "\n")


def remove_label(folder: Path) -> None:
    path = folder / "coco" / "coco_pope_random.json"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "llava_pope_test.jsonl"
        path.write_text(path.read_text().replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_label, r"coco_pope_random\.json, line 2, field 'label': 'perhaps' is neither"),
        (contradict_label, r"coco_pope_random\.json, line 7, field 'label': the same question"),
        (remove_label, r"llava_pope_test\.jsonl, line 13, field 'text': no label in coco_pope_random\.json"),
        (edit('"adversarial"', '"hard"'), "line 1, field 'category': 'hard' has no label file"),
        (edit('"question_id": 2,', '"question_id": 1,'), "line 2, field 'question_id': '1' is there twice: first in"),
        (edit('"image": "COCO', '"image": "../../COCO'), "line 1, field 'text': no label"),
        (edit('"image"', '"img"'), r"line 1, field 'image': missing\. Found: question_id, img"),
        (edit("{", "", ), "line 1: not valid JSON"),
    ],
)  # fmt: skip
def test_pope_damaged(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    data = pope(tmp_path, BALANCED)
    damage(data.parent)
    with pytest.raises(UserError, match=message):
        get("pope").read(data)


# --- MME --------------------------------------------------------------------------------------------------------------


def test_mme_right_answers_give_the_whole_score(tmp_path: Path) -> None:
    report = run("mme", mme(tmp_path, TASKS), tmp_path)
    assert value(report, "score", "mme", "perception") == 4  # of two tasks; printed in percent: 400
    assert value(report, "score", "mme", "cognition") == 2
    assert value(report, "score", "mme", "artwork") == 2
    assert "| l2-category: perception | 400.0 (400.0–400.0)" in (tmp_path / "out" / "report.md").read_text()
    assert "Tasks that the file lacks" in " ".join(report.notes)


def test_mme_accuracy_plus_counts_images(tmp_path: Path) -> None:
    def always_yes_but_of_one(question: Question) -> str:
        return knows(question) if question.group == "existence/0001.png" else "Yes"

    report = run("mme", mme(tmp_path, TASKS), tmp_path, always_yes_but_of_one)
    assert value(report, "accuracy", "mme", "existence") == 0.75
    assert value(report, "accuracy+", "mme", "existence") == 0.5
    assert value(report, "score", "mme", "existence") == 1.25
    assert value(report, "score", "mme", "code_reasoning") == 0.5


def test_mme_submission_is_what_its_tool_reads(tmp_path: Path) -> None:
    run("mme", mme(tmp_path, TASKS), tmp_path, lambda question: "Yes,\tit\nis")
    written = {path.name: path.read_text() for path in (tmp_path / "out" / "submission").iterdir()}
    assert sorted(written) == ["artwork.txt", "code_reasoning.txt", "existence.txt"]
    assert written["existence.txt"].splitlines()[:2] == [
        "0000.txt\tIs it 0?  Please answer yes or no.\tYes\tYes, it is",
        "0000.txt\tIs it not 0? Please answer yes or no.\tNo\tYes, it is",
    ]


@settings(max_examples=20)
@given(st.data())
def test_mme_by_definition(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    images = data.draw(st.integers(1, 4))
    read = get("mme").read(mme(tmp_path_factory.mktemp("mme"), {"count": images}))
    said = data.draw(st.lists(st.sampled_from(["yes", "no", None]), min_size=2 * images, max_size=2 * images))
    parsed = {question.id: {"mme": answer} for question, answer in zip(read.questions, said, strict=True)}
    right = [answer == question.answer for question, answer in zip(read.questions, said, strict=True)]
    pairs = sum(first and second for first, second in zip(right[::2], right[1::2], strict=True))
    found = {(s.metric, s.name): s.value for s in get("mme").score(read.questions, parsed)}
    assert found["score", "count"] == pytest.approx(sum(right) / len(right) + pairs / images)
    assert found["score", "overall"] == found["score", "perception"] == pytest.approx(found["score", "count"])


def test_mme_single_question_of_a_image_counts_as_wrong_pair(tmp_path: Path) -> None:
    data = mme(tmp_path, {"count": 2})
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    report = run("mme", data, tmp_path)
    assert value(report, "accuracy+", "mme", "count") == 0.5
    assert "1 images have not exactly two questions (first: count/0000.png)" in " ".join(report.notes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("existence/0000", "existance/0000", "'existance' is not a task of MME. Did you mean 'existence'"),
        ("Is it 0?", "Was it 0?", "line 1, field 'text': the question is not in .*0000.txt: 'Was it 0"),
        ("existence/0000.png\", \"image", "existence/0009.png\", \"image", "no answers for it: neither"),
    ],
)  # fmt: skip
def test_mme_damaged(tmp_path: Path, old: str, new: str, message: str) -> None:
    data = mme(tmp_path, TASKS)
    data.write_text(data.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        get("mme").read(data)


def test_mme_damaged_answers(tmp_path: Path) -> None:
    data = mme(tmp_path, TASKS)
    file = data.parent / "MME_Benchmark_release_version" / "existence" / "0000.txt"
    file.write_text("Is it 0? Yes\n")
    with pytest.raises(UserError, match=r"0000\.txt, line 1: a question, a tab, and Yes or No"):
        get("mme").read(data)


def test_mme_table_pairs_by_image(tmp_path: Path) -> None:
    rows = [
        {"index": n, "question": f"Q{n} Please answer yes or no.", "answer": "Yes" if n % 2 else "No"}
        | {"category": "color", "image_path": f"color/{n // 2}.jpg", "image": encoded_image((n // 2, 1, 1))}
        for n in (0, 3, 1, 2)  # pairs are apart
    ]
    columns = ("index", "question", "answer", "category", "image_path", "image")
    report = run("mme", write_tsv(tmp_path / "MME.tsv", rows, columns), tmp_path, lambda question: "Yes")
    assert value(report, "accuracy", "mme", "color") == 0.5
    assert value(report, "accuracy+", "mme", "color") == 0
    assert get("mme").read(tmp_path / "MME.tsv").questions[0].prompt == f"Q0 Please answer yes or no.\n{SHORT}"


# --- HallusionBench ---------------------------------------------------------------------------------------------------


def hallusion(path: Path, indices: list[tuple[str, str, str]]) -> Path:
    rows = [
        {"index": index, "question": f"Is {index} right?", "answer": "Yes", "category": category, "l2-category": kind}
        | {"image": encoded_image((len(index), 7, 7))}
        for index, category, kind in indices
    ]
    return write_tsv(path, rows, ("index", "question", "answer", "category", "l2-category", "image"))


def test_hallusionbench_figures_and_questions(tmp_path: Path) -> None:
    # Two figures, two questions each, of one set; question 1 about figure 0 is answered wrongly.
    names = [(f"VD_map_x_0_{figure}_{question}", "VD", "map") for figure in (0, 1) for question in (0, 1)]
    data = hallusion(tmp_path / "HallusionBench.tsv", names)
    report = run("hallusionbench", data, tmp_path, lambda q: "No" if q.id == "VD_map_x_0_0_1" else "Yes, it is.")
    assert value(report, "aAcc") == 0.75
    assert value(report, "fAcc") == 0.5  # figure 1
    assert value(report, "qAcc") == 0.5  # question 0
    assert value(report, "fAcc", "vlmevalkit", "VD") == 0.5
    assert get("hallusionbench").read(data).questions[0].prompt == "Is VD_map_x_0_0_0 right?"


def test_hallusionbench_without_a_image(tmp_path: Path) -> None:
    # As VLMEvalKit, which leaves such questions out: its rule does, ours does not.
    data = hallusion(tmp_path / "h.tsv", [("VS_ocr_x_0_0_0", "VS", "ocr"), ("VS_ocr_x_0_1_0", "VS", "ocr")])
    lines = data.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join([*lines[:2], lines[2].rpartition("\t")[0] + "\t"]) + "\n", encoding="utf-8")
    report = run("hallusionbench", data, tmp_path, lambda q: "Yes" if q.images else "No")
    assert (value(report, "aAcc"), value(report, "qAcc")) == (0.5, 0)
    assert (value(report, "aAcc", "vlmevalkit"), value(report, "qAcc", "vlmevalkit")) == (1, 1)
    assert any("1 of 2 questions have no image" in note for note in report.notes)


def test_hallusionbench_same_name_in_two_categories(tmp_path: Path) -> None:
    # As VLMEvalKit: overall they are one figure, in each category one of its own.
    names = [("VD_ocr_x_0_0_0", "VD", "ocr"), ("VS_ocr_x_0_0_0", "VS", "ocr")]
    report = run(
        "hallusionbench", hallusion(tmp_path / "h.tsv", names), tmp_path, lambda q: "Yes" if q.id[1] == "D" else "No"
    )
    assert value(report, "fAcc", "vlmevalkit") == 0
    assert value(report, "fAcc", "strict") == 0.5  # the authors name a figure by its category too
    assert value(report, "fAcc", name="VD") == 1
    assert value(report, "fAcc", name="VS") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "1"}, r"row 1 \(line 2\), column 'answer': '1' is neither Yes nor No"),
        ({"index": "VD_0_1"}, "column 'index': 'VD_0_1': six parts are expected"),
        ({"question": " "}, "column 'question': empty"),
    ],
)
def test_yes_no_table_damaged(tmp_path: Path, change: dict[str, str], message: str) -> None:
    row = {"index": "VD_a_b_0_0_0", "question": "Is it?", "answer": "Yes", "image": encoded_image((1, 1, 1))}
    data = write_tsv(tmp_path / "HallusionBench.tsv", [{**row, **change}], ("index", "question", "answer", "image"))
    with pytest.raises(UserError, match=message):
        get("hallusionbench").read(data)


def test_an_empty_question_file(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    with pytest.raises(UserError, match="is empty"):
        get("pope").read(write_jsonl(tmp_path / "llava_pope_test.jsonl", []))
