"""TextVQA, VQA v2, VizWiz, GQA and one's own questions: files, prompts, scores, submission files, damaged input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.report import Report
from llava_npu.evaluation.run import evaluate
from support.benchmark_samples import SHORT, gqa, save_image, scienceqa, textvqa, vizwiz, vqav2, write_jsonl
from support.evaluation_samples import FakeAnswerer, encoded_image, knows, write_tsv

INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."


def run(name: str, data: Path, tmp_path: Path, respond: Callable[[Question], str] = knows) -> Report:
    return evaluate(name, data, FakeAnswerer(respond), tmp_path / "out")


def value(report: Report, metric: str, rule: str = "strict", name: str = "overall") -> float:
    (found,) = [s for s in report.scores if (s.metric, s.extraction, s.name) == (metric, rule, name)]
    return found.value


def submitted(tmp_path: Path, name: str) -> Any:
    return json.loads((tmp_path / "out" / "submission" / name).read_text())


def test_textvqa(tmp_path: Path) -> None:
    data = textvqa(tmp_path)
    first, second = get("textvqa").read(data).questions
    assert first.prompt == f"What brand is it?\nReference OCR token: COLA, 1886\n{SHORT}"
    assert (first.id, second.id, first.text) == ("abc/1", "abc/2", "What brand is it?")
    report = run("textvqa", data, tmp_path, lambda question: "Cola." if question.id == "abc/1" else "The red")
    assert value(report, "VQA accuracy", "llava") == pytest.approx((0.9 + 1) / 2)
    assert value(report, "VQA accuracy") == value(report, "VQA accuracy", "llava")


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("OCR tokens: a b. Question: Which one? Short answer:", "Which one?"),
        (f"Reference OCR token: a\nWhich one?\n{SHORT}", "Which one?"),
        (f"Which one?\n{SHORT}", "Which one?"),
    ],
)
def test_textvqa_prompt_forms(tmp_path: Path, prompt: str, question: str) -> None:
    data = textvqa(tmp_path)
    annotations = data.parent / "TextVQA_0.5.1_val.json"
    annotations.write_text(annotations.read_text().replace("What brand is IT?", question))
    write_jsonl(data, [{"question_id": "abc", "image": "abc.png", "text": prompt}])
    (read,) = get("textvqa").read(data).questions
    assert (read.text, read.prompt) == (question, prompt)


def test_textvqa_damaged(tmp_path: Path) -> None:
    data = textvqa(tmp_path)
    write_jsonl(data, [{"question_id": "abc", "image": "abc.png", "text": f"Who?\n{SHORT}"}])
    with pytest.raises(UserError, match="line 1, field 'text': no answers in the annotations for image 'abc'"):
        get("textvqa").read(data)
    write_jsonl(data, [{"question_id": "abc", "image": "abc.png", "text": "Who?"}])
    with pytest.raises(UserError, match="line 1, field 'text': not a prompt of LLaVA's"):
        get("textvqa").read(data)
    data.write_bytes(b'{"question_id": 1}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 2: not UTF-8"):
        get("textvqa").read(data)


def test_textvqa_table(tmp_path: Path) -> None:
    rows = [
        {"index": 1, "question": "What?", "answer": str(["nan"] * 2 + ["1"] * 8), "image": encoded_image((1, 2, 3))},
        {"index": 2, "question": "What?", "answer": str(["'s"] * 10), "image": "1"},
    ]
    data = write_tsv(tmp_path / "TextVQA_VAL.tsv", rows, ("index", "question", "answer", "image"))
    report = run("textvqa", data, tmp_path, lambda question: "nan" if question.id == "1" else "'s")
    assert value(report, "VQA accuracy") == pytest.approx((0.6 + 1) / 2)
    assert get("textvqa").read(data).questions[0].prompt == f"What?\n{SHORT}"


@pytest.mark.parametrize("said", ["", f"\n{SHORT}", f"\n{INSUFFICIENT}\n{SHORT}"])
def test_an_instruction_that_a_table_carries_is_not_given_twice(tmp_path: Path, said: str) -> None:
    row = {"index": 1, "question": f"What?{said}", "answers": "['a']", "image": encoded_image((1, 2, 3))}
    (question,) = get("vizwiz").read(write_tsv(tmp_path / "VizWiz.tsv", [row], tuple(row))).questions
    assert question.prompt == f"What?\n{INSUFFICIENT}\n{SHORT}"


def test_vqav2_submission_covers_the_whole_test_set(tmp_path: Path) -> None:
    # Reference: LLaVA's convert_vqav2_for_submission.py.
    report = run("vqav2", vqav2(tmp_path), tmp_path, lambda question: "Two, the cats.")
    assert report.scores == ()
    assert submitted(tmp_path, "vqav2.json") == [
        {"question_id": 7, "answer": ""},
        {"question_id": 1, "answer": "2 cats"},
        {"question_id": 2, "answer": "2 cats"},
        {"question_id": 3, "answer": ""},
    ]
    assert "2 of 2 questions have no answer here: predicted, not scored." in report.notes


def test_vqav2_without_the_whole_test_set(tmp_path: Path) -> None:
    data = vqav2(tmp_path)
    (data.parent / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    report = run("vqav2", data, tmp_path, lambda question: "no")
    assert len(submitted(tmp_path, "vqav2.json")) == 2
    assert "The server wants an answer to every question of test2015" in " ".join(report.notes)


def test_vqav2_is_scored_where_answers_are_given(tmp_path: Path) -> None:
    save_image(tmp_path / "val2014" / "a.png")
    line = {"question_id": 1, "image": "a.png", "text": f"Colour?\n{SHORT}", "answers": ["red"] * 2 + ["blue"] * 8}
    report = run("vqav2", write_jsonl(tmp_path / "val.jsonl", [line]), tmp_path, lambda question: "Red")
    assert value(report, "VQA accuracy") == pytest.approx(0.6)


def test_vizwiz(tmp_path: Path) -> None:
    run("vizwiz", vizwiz(tmp_path), tmp_path, lambda question: "Unanswerable.")
    assert submitted(tmp_path, "vizwiz.json") == [{"image": "VizWiz_test_0.png", "answer": "unanswerable"}]


def test_vizwiz_table_has_answers(tmp_path: Path) -> None:
    row = {"index": 1, "question": "What?", "answers": str(["can"] * 10), "image": encoded_image((1, 2, 3))}
    data = write_tsv(tmp_path / "VizWiz.tsv", [row], ("index", "question", "answers", "image"))
    report = run("vizwiz", data, tmp_path, lambda question: "a can")
    assert value(report, "VQA accuracy") == 1
    assert not (tmp_path / "out" / "submission").exists()


def test_gqa(tmp_path: Path) -> None:
    data = gqa(tmp_path)
    report = run("gqa", data, tmp_path, lambda question: "The dining table." if question.id == "201" else "No.")
    assert value(report, "accuracy") == 1
    assert value(report, "accuracy", "llava") == 0.5  # an article is an error there
    assert value(report, "accuracy", name="query") == 1
    assert submitted(tmp_path, "testdev_balanced_predictions.json") == [
        {"questionId": "201", "prediction": "the dining table"},
        {"questionId": "202", "prediction": "no"},
    ]


def test_gqa_without_annotations_only_predicts(tmp_path: Path) -> None:
    data = gqa(tmp_path)
    (data.parent / "data" / "testdev_balanced_questions.json").unlink()
    report = run("gqa", data, tmp_path, lambda question: "no")
    assert report.scores == ()
    assert "predicted, not scored. Looked for: data/testdev_balanced" in " ".join(report.notes)


OWN = {"question_id": "a", "question": "Which?", "image": "a.png"}


def test_own_questions(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    lines = [
        {**OWN, "answer": "Two cats", "category": "count"},
        {**OWN, "question_id": 2, "answers": ["A dog", "a hound"]},
        {"question_id": 3, "question": "Capital?", "answers": ["x"] * 7 + ["y"] * 3},
        {**OWN, "question_id": 4},
    ]
    data = write_jsonl(tmp_path / "own.jsonl", lines)
    said = {"a": "2 cats.", "2": "hound", "3": "y", "4": "?"}
    report = run("vqa_jsonl", data, tmp_path, lambda question: said[question.id])
    assert value(report, "exact match") == 1
    assert value(report, "exact match", name="count") == 1
    assert value(report, "VQA accuracy") == pytest.approx(0.9)
    assert "1 of 4 questions have no answer here: predicted, not scored." in report.notes
    assert get("vqa_jsonl").read(data).questions[2].images == ()


def test_an_empty_answer_is_never_right(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    data = write_jsonl(tmp_path / "own.jsonl", [{**OWN, "answer": "!"}])
    report = run("vqa_jsonl", data, tmp_path, lambda question: "")
    assert value(report, "exact match") == 0
    assert value(report, "exact match", "llava") == 1  # the original's comparison


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Which?"}, "line 1, field 'question_id': missing. Found: question"),
        ({**OWN, "question": " "}, "line 1, field 'question': empty"),
        ({**OWN, "image": "/etc/passwd"}, "line 1, field 'image': '/etc/passwd' leads out of"),
        ({**OWN, "image": ["a.png"]}, "line 1, field 'image': .* is not a string"),
        ({**OWN, "answers": "red"}, "line 1, field 'answers': 'red' is not a list of strings"),
        ({**OWN, "answers": ["red"], "answer": "red"}, "line 1, field 'answer': both"),
        ({"question_id": 1, "question": "Which?", "img": "a.png"}, "line 1: 'img' is 'a.png'; rename it to 'image'"),
        ({"question_id": 1, "question": "Which?", "video": "a.mp4"}, "line 1: 'video' is .* only images are read"),
    ],
)
def test_own_questions_damaged(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get("vqa_jsonl").read(write_jsonl(tmp_path / "own.jsonl", [line]))


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"question_id": 1, "question": "a"}\n["b"]\n')
    with pytest.raises(UserError, match="line 2: an object is expected, not a list"):
        get("vqa_jsonl").read(path)


def test_a_missing_image_counts_as_wrong(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    lines = [{**OWN, "answer": "x"}, {**OWN, "question_id": "b", "image": "b.png", "answer": "x"}]
    report = run("vqa_jsonl", write_jsonl(tmp_path / "own.jsonl", lines), tmp_path, lambda question: "x")
    assert report.num_errors == 1
    assert {score.value for score in report.scores} == {0.5}


def test_images_that_are_all_missing(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "own.jsonl", [{**OWN, "answer": "x"}])
    with pytest.raises(UserError, match=r"none of its 1 images is there. The first is looked for at .*a\.png"):
        run("vqa_jsonl", data, tmp_path, lambda question: "x")


def test_a_file_without_a_question_of_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no question of ScienceQA \(IMG\)"):
        run("scienceqa_img", scienceqa(tmp_path, [False]), tmp_path)
