"""Scores on the published files' peculiarities, next to the code that published scores come from.

References, run next to ours on made answers: open-compass/VLMEvalKit at e8e78f05 (vlmeval/dataset/utils/
multiple_choice.py), tianyi-lab/HallusionBench at 744007c2 (utils.py), MMMU-Benchmark/MMMU at bb0b95a9
(mmmu/utils/eval_utils.py; also on its published outputs of two models).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.benchmarks.mmmu import is_right, read_choice
from llava_npu.evaluation.extraction.rules import extract_strict
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.report import Report
from llava_npu.evaluation.run import evaluate
from support.benchmark_samples import mme, mmvet, pope, save_image, scienceqa, seedbench, write_json
from support.evaluation_samples import FakeAnswerer, encoded_image, knows, question_row, write_tsv


def run(name: str, data: Path, tmp_path: Path, respond: Callable[[Question], str] = knows) -> Report:
    return evaluate(name, data, FakeAnswerer(respond), tmp_path / "out")


def overall(report: Report, metric: str) -> dict[str, float]:
    return {s.extraction: s.value for s in report.scores if (s.metric, s.level) == (metric, "overall")}


# --- MMBench ----------------------------------------------------------------------------------------------------------


def fixed_last(group: int) -> list[dict[str, object]]:
    """Three rotations of four options: the last stays in place, as in 53 groups of the published dev file."""
    texts = [f"thing {group}", f"other {group}B", f"other {group}C"]
    return [{**question_row(group, texts, 0, rotation), "D": "None of the above"} for rotation in range(3)]


def test_a_group_whose_last_option_stays_has_one_rotation_less(tmp_path: Path) -> None:
    report = run("mmbench", write_tsv(tmp_path / "b.tsv", fixed_last(1009)), tmp_path)
    assert overall(report, "circular") == {"strict": 1, "vlmevalkit": 1}
    assert not any("lack rotations" in note for note in report.notes)


def test_lacking_rotations_count_as_wrong_but_by_vlmevalkits_rule(tmp_path: Path) -> None:
    whole = [question_row(2, ["a", "b", "c", "d"], 0, rotation) for rotation in range(4)]
    rows = [*fixed_last(1), *whole[:3]]  # in the second group every option moves: one rotation lacks
    report = run("mmbench", write_tsv(tmp_path / "b.tsv", rows), tmp_path)
    assert overall(report, "circular") == {"strict": 0.5, "vlmevalkit": 1}
    assert any("1 of 2 groups lack rotations" in note and "2 has 3 of 4" in note for note in report.notes)
    # Without its unrotated row a group is not counted there.
    rows = [*fixed_last(1), *({**row, "image": encoded_image((1, 2, 3))} for row in whole[1:])]
    report = evaluate("mmbench", write_tsv(tmp_path / "c.tsv", rows), FakeAnswerer(knows), tmp_path / "second")
    assert overall(report, "circular") == {"strict": 0.5, "vlmevalkit": 1}


def test_a_rotation_that_only_looks_fixed_is_lacking(tmp_path: Path) -> None:
    rows = [question_row(1, ["x", "x", "y", "z"], 2, rotation) for rotation in range(2)]  # A is x in both
    report = run("mmbench", write_tsv(tmp_path / "b.tsv", rows), tmp_path)
    assert overall(report, "circular")["strict"] == 0


# --- other files ------------------------------------------------------------------------------------------------------


def test_pope_labels_as_corrected_since_llavas_questions(tmp_path: Path) -> None:
    data = pope(tmp_path, [["yes", "no"]])
    data.write_text(data.read_text().replace("Is there a thing 0 in the image?", "Is there a apple in the imange?"))
    labels = data.parent / "coco" / "coco_pope_adversarial.json"
    labels.write_text(labels.read_text().replace("Is there a thing 0 in the image?", "Is there an apple in the image?"))
    assert overall(run("pope", data, tmp_path), "accuracy")["strict"] == 1


def test_seedbench_asks_both_questions_of_one_id(tmp_path: Path) -> None:
    data = seedbench(tmp_path)
    whole = json.loads((data.parent / "SEED-Bench.json").read_text())
    whole["questions"][1]["question_id"] = "0"
    write_json(data.parent / "SEED-Bench.json", whole)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[1]["question_id"] = 0
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = get("seedbench").read(data).questions
    assert (first.id, second.id) == ("0", "0#2")
    assert (first.answer, second.answer) == ("A", "C")
    assert overall(run("seedbench", data, tmp_path), "vanilla")["llava"] == 1
    submitted = (tmp_path / "out" / "submission" / "seed_bench.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in submitted] == ["0", "0"]


def test_mmstar_skips_an_empty_option(tmp_path: Path) -> None:
    row = question_row(1, ["", "cat", "dog", "cow"], 2)
    (question,) = get("mmstar").read(write_tsv(tmp_path / "MMStar.tsv", [row])).questions
    assert dict(question.options) == {"B": "cat", "C": "dog", "D": "cow"}
    assert question.answer == "C"
    assert "A." not in question.prompt


def hallusionbench(root: Path) -> Path:
    """One set of two questions: without an image, with the original and with an edited one."""
    records = []
    for visual, truths in (("0", "10"), ("1", "10"), ("2", "01")):
        name = f"./hallusion_bench/VS/map/0_{visual}.png" if visual != "0" else None
        if name:
            save_image(root / name, int(visual))
        for number, truth in enumerate(truths):
            ids: dict[str, Any] = {
                "visual_input": visual,
                "set_id": "0",
                "figure_id": visual,
                "question_id": str(number),
            }
            records.append(
                {"category": "VS", "subcategory": "map", **ids, "question": f"{visual}{number}?", "gt_answer": truth}
                | {"filename": name, "gt_answer_details": "-"}
            )
    return write_json(root / "HallusionBench.json", records)


def test_hallusionbench_as_published(tmp_path: Path) -> None:
    data = hallusionbench(tmp_path)
    questions = get("hallusionbench").read(data).questions
    assert [question.id for question in questions][:3] == ["VS_map_0_0_0_0", "VS_map_0_0_0_1", "VS_map_1_0_1_0"]
    assert questions[2].images[0].open().size == (8, 8)

    def respond(question: Question) -> str:
        if not question.images:
            return "I cannot tell."  # counts as right, as the authors count it
        return "I cannot tell." if question.id == "VS_map_2_0_2_1" else str(question.answer)

    report = run("hallusionbench", data, tmp_path, respond)
    assert overall(report, "aAcc")["strict"] == pytest.approx(5 / 6)
    assert overall(report, "fAcc")["strict"] == 0.5  # of the two figures; no image is no figure
    assert overall(report, "qAcc")["strict"] == 0.5
    assert overall(report, "aAcc")["vlmevalkit"] == 0.75  # of the questions with an image


def test_hallusionbench_damaged(tmp_path: Path) -> None:
    data = hallusionbench(tmp_path)
    data.write_text(data.read_text().replace('"gt_answer": "0"', '"gt_answer": "maybe"', 1))
    with pytest.raises(UserError, match="record 2, field 'gt_answer': 'maybe' is neither 0"):
        get("hallusionbench").read(data)


def test_mmmu_open_questions_with_several_truths(tmp_path: Path) -> None:
    row = {"index": 1, "question": "How much?", "answer": "['24/7', '3.429']", "image": encoded_image((3, 3, 3))}
    data = write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", [{**row, "split": "validation"}])
    (question,) = get("mmmu").read(data).questions
    assert question.references == ("24/7", "3.429")
    found = overall(run("mmmu", data, tmp_path, lambda question: "3.429"), "vanilla")
    assert (found["strict"], found["mmmu"]) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(A) or (C)", "C"),  # the last
        ("It is B or C .", "C"),
        ("B.", "B"),
        ("I would say that it is certainly a red car", "C"),  # of more than five words: an option's text
        ("a red car", None),
        ("b", None),  # theirs would draw an option
        ("", None),
    ],
)
def test_mmmu_choices(answer: str, expected: str | None) -> None:
    assert read_choice(answer, {"A": "cat", "B": "dog", "C": "a red car"}) == expected


@pytest.mark.parametrize(
    ("answer", "truths", "right"),
    [
        ("The answer is 3.43.", ["3.429"], True),  # to two decimals
        ("So x = 1,200", ["1200"], True),
        ("It could be 7", ["5"], False),
        ("the result is a magnetic field", ["Magnetic Field"], True),
        ("5 is wrong, it is 6", ["5"], False),  # only what follows the last key counts
        ("five", ["5"], False),
    ],
)
def test_mmmu_open_answers(answer: str, truths: list[str], right: bool) -> None:
    assert is_right(answer, truths) is right


def test_mmmu_reports_what_its_authors_would_draw(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", [question_row(1, ["cat", "dog"], 0, split="validation")])
    report = run("mmmu", data, tmp_path, lambda question: "who knows")
    assert overall(report, "vanilla")["mmmu"] == 0
    assert any("1 choices cannot be read by the rule mmmu (first: 1) and count as wrong" in n for n in report.notes)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.5\nBecause…", "0.5"),
        ("Score: 1.0\n\nAll of it.", "1.0"),
        ("0.5 because …", "0.5"),
        ("Grade: **0.5**", "0.5"),
        ("The grade is 0.5/1.0", "0.5"),
        ("x\n1", None),
        ("1. The answer …", None),
        ("0,5", None),
        ("1/2", None),
        ("1.5", None),
    ],
)
def test_mmvets_judge_may_explain_itself(tmp_path: Path, reply: str, grade: str | None) -> None:
    benchmark = get("mmvet")
    assert benchmark.judging is not None
    question = benchmark.read(mmvet(tmp_path)).questions[0]
    assert benchmark.judging.read(question, reply) == grade


def test_scienceqa_options_that_differ_by_case() -> None:
    options = {"A": "Life of Pi", "B": "Life of pi"}
    assert extract_strict("A. Life of Pi", options) == "A"
    assert extract_strict("B. Life of pi", options) == "B"
    assert extract_strict("Life of Pi", options) is None


def test_scienceqa_reads_a_letter_with_its_own_text(tmp_path: Path) -> None:
    data = scienceqa(tmp_path, [False])
    assert overall(run("scienceqa", data, tmp_path, lambda q: f"{q.answer}. option 1"), "accuracy")["strict"] == 1


def test_what_stands_twice_and_differs_is_refused(tmp_path: Path) -> None:
    data = mme(tmp_path, {"existence": 1})
    truths = data.parent / "MME_Benchmark_release_version/existence/0000.txt"
    truths.write_text(truths.read_text() + truths.read_text().splitlines()[0].replace("Yes", "No") + "\n")
    with pytest.raises(UserError, match=r"0000.txt, line 3: the same question has the answers Yes and No"):
        get("mme").read(data)
    data.write_text(data.read_text().replace("existence/0000.png", ".", 1))
    with pytest.raises(UserError, match=r"'question_id': '.' is not a task of MME"):
        get("mme").read(data)

    data = seedbench(tmp_path)
    annotations = data.parent / "SEED-Bench.json"
    whole = json.loads(annotations.read_text())
    first = whole["questions"][0]
    annotations.write_text(json.dumps({**whole, "questions": [*whole["questions"], {**first, "answer": "D"}]}))
    with pytest.raises(UserError, match="question '0' is there twice, with different answers"):
        get("seedbench").read(data)
    annotations.write_text(json.dumps({**whole, "questions": [{**first, "question": "Why?"}, *whole["questions"][1:]]}))
    assert any("1 questions have other words" in note for note in get("seedbench").read(data).notes)


def test_an_option_that_is_nothing_does_not_shift_the_others(tmp_path: Path) -> None:
    data = scienceqa(tmp_path, [False])
    problems = data.parent / "problems.json"
    problem = json.loads(problems.read_text())["1"]
    problems.write_text(json.dumps({"1": {**problem, "choices": [float("nan"), "x", "y"]}}))
    with pytest.raises(UserError, match="'choices': an option before others is NaN"):
        get("scienceqa").read(data)


def test_mme_leading_spaces_move_what_the_tool_reads(tmp_path: Path) -> None:
    data = mme(tmp_path, {"count": 1})
    file = data.parent / "MME_Benchmark_release_version" / "count" / "0000.txt"
    file.write_text(file.read_text().replace("Is it 0?", " Is  it 0?"))  # spaces in questions do not matter
    report = run("mme", data, tmp_path, lambda question: f"  {question.answer}\n(sure)")
    # The tool looks at the first four characters: "  ye" is neither, "  no" is no.
    assert overall(report, "score")["mme"] == 0.5
    assert overall(report, "score")["strict"] == 2
    written = (tmp_path / "out" / "submission" / "count.txt").read_text().splitlines()
    assert [line.split("\t")[3] for line in written] == ["  yes (sure)", "  no (sure)"]


def test_nan_is_no_answer(tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text(
        '{"question_id": 1, "question": "?", "answer": NaN}\n'
        '{"question_id": 2, "question": "?", "answers": [NaN, "a"]}\n'
    )
    first, second = get("vqa_jsonl").read(data).questions
    assert (first.answer, second.references) == (None, ("a",))
