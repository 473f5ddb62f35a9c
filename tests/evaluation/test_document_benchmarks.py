"""ChartQA, DocVQA, InfographicVQA, OCRBench: published files, and scores next to those of the official code.

The outcomes are those of the functions named in the benchmarks' files, at the commits given there, on these answers;
`benchmarks/official_scorers.py` compares thousands more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.extraction.similarity import anls, edit_distance, relaxed_match, relaxed_match_strict
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.report import Report
from llava_npu.evaluation.run import evaluate
from support.benchmark_samples import save_image, write_json
from support.evaluation_samples import FakeAnswerer, encoded_image, image_bytes, knows, write_parquet, write_tsv

SHORT = "Answer the question using a single word or phrase."


def values(report: Report, metric: str, rule: str) -> dict[str, float]:
    return {s.name: s.value for s in report.scores if (s.metric, s.extraction) == (metric, rule)}


@pytest.mark.parametrize(
    ("answer", "truth", "relaxed", "strict"),
    [
        ("105", "100", True, True),  # to the last digit of the tolerance
        ("95", "100", True, True),
        ("105.1", "100", False, False),
        ("-104", "-100", True, True),
        ("12%", "0.12", True, False),
        ("12%", "12", False, True),
        ("12", "12%", False, True),
        ("1,200", "1200", False, True),
        ("$1,200.", "1200", False, True),
        ("0.0", "0", False, True),
        ("0", "0", True, True),
        ("nan", "nan", False, False),
        ("1e2", "100", True, True),
        ("Yes", "yes", True, True),
        ("yes.", "yes", False, True),
        ("2010", "2019", True, True),  # a year is a number
        ("", "5", False, False),
    ],
)
def test_relaxed_accuracy(answer: str, truth: str, relaxed: bool, strict: bool) -> None:
    assert relaxed_match(answer, truth) is relaxed
    assert relaxed_match_strict(answer, truth) is strict


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Hello  World", ("hello world",), 1.0),
        ("hello wrld", ("hello world",), 1 - 1 / 11),
        ("helo", ("abcd", "hello"), 0.8),
        ("ab", ("abcd",), 0.5),
        ("a", ("abc",), 0.0),  # below one half
        ("", ("a",), 0.0),
        ("", ("",), 1.0),
        ("  x", ("y",), 1 - 1 / 3),  # the length counts the spaces, the distance does not
        ("STRASSE", ("straße",), 1 - 2 / 7),
    ],
)
def test_anls(answer: str, references: tuple[str, ...], expected: float) -> None:
    assert anls(answer, references) == pytest.approx(expected, abs=1e-12)


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3
    assert edit_distance("", "abc") == 3


def test_chartqa_in_its_three_forms(tmp_path: Path) -> None:
    rows = [
        {"type": "human_test", "question": "How many?", "answer": "100", "image": image_bytes(1)},
        {"type": "augmented_test", "question": "Which?", "answer": "Blue", "image": image_bytes(2)},
    ]
    hub = write_parquet(tmp_path / "ChartQA" / "data" / "test-00000-of-00001.parquet", rows)
    for number, kind in enumerate(("human", "augmented")):
        save_image(tmp_path / "release" / "test" / "png" / f"{number}.png", number)
        record = {"imgname": f"{number}.png", "query": rows[number]["question"], "label": rows[number]["answer"]}
        write_json(tmp_path / "release" / "test" / f"test_{kind}.json", [record])
    table = [
        {"index": n, "question": row["question"], "answer": row["answer"], "split": f"test_{kind}",
         "image": encoded_image((n, 2, 3))}
        for n, (row, kind) in enumerate(zip(rows, ("human", "augmented"), strict=True))
    ]  # fmt: skip
    columns = ("index", "question", "answer", "split", "image")
    forms = [tmp_path, tmp_path / "release" / "test" / "test_human.json", write_tsv(tmp_path / "c.tsv", table, columns)]
    for number, data in enumerate(forms):
        dataset = read_dataset(get("chartqa"), data)
        assert [q.prompt for q in dataset.questions] == [f"How many?\n{SHORT}", f"Which?\n{SHORT}"]
        said = {"0": "104 ", "1": "bluish"}
        report = evaluate("chartqa", data, FakeAnswerer(lambda q, said=said: said[q.id]), tmp_path / f"out{number}")
        assert values(report, "relaxed accuracy", "relaxed") == {"overall": 0.5, "human": 1.0, "augmented": 0.0}
    assert read_dataset(get("chartqa"), hub).questions[0].images[0].open().size == (24, 24)


def test_chartqa_as_the_other_hub_has_it(tmp_path: Path) -> None:
    rows = [{"query": "How many?", "label": ["5"], "human_or_machine": n, "image": image_bytes(n)} for n in (0, 1)]
    path = write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    assert [q.category for q in read_dataset(get("chartqa"), path).questions] == ["human", "augmented"]


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_documents(name: str, tmp_path: Path) -> None:
    kinds = {"docvqa": {"question_types": ["form", "layout"]}, "infovqa": {"answer_type": ["Image-Span"]}}[name]
    record = {"questionId": "337", "question": "Who?", "answers": ["Ann Smith", "A. Smith"], **kinds}
    hub = write_parquet(tmp_path / "validation-00000-of-00001.parquet", [{**record, "image": image_bytes()}])
    save_image(tmp_path / "documents" / "a.png")
    place = {"docvqa": {"image": "documents/a.png"}, "infovqa": {"image_local_name": "a.png"}}[name]
    release = write_json(tmp_path / "val.json", {"data": [{**record, "questionId": 337, **place}]})
    for number, data in enumerate((hub, release)):
        report = evaluate(name, data, FakeAnswerer(lambda question: "ann smit"), tmp_path / f"out{number}")
        expected = dict.fromkeys(["overall", *next(iter(kinds.values()))], 1 - 1 / 9)
        assert values(report, "ANLS", "anls") == pytest.approx(expected)
    submitted = json.loads((tmp_path / "out1" / "submission" / "val.json_submission.json").read_text())
    assert submitted == [{"questionId": 337, "answer": "ann smit"}]


def test_a_document_split_without_answers_is_predicted(tmp_path: Path) -> None:
    row = {"questionId": "1", "question": "Who?", "answers": None, "image": image_bytes()}
    data = write_parquet(tmp_path / "test-00000-of-00001.parquet", [row])
    report = evaluate("docvqa", data, FakeAnswerer(lambda question: "x"), tmp_path / "out")
    assert not report.scores
    assert (tmp_path / "out" / "submission" / "test_submission.json").is_file()


FORMULA = "Handwritten Mathematical Expression Recognition"


@pytest.mark.parametrize(
    ("answer", "references", "kind", "expected"),
    [
        ("It says CENTRE.", ("centre",), "Regular Text Recognition", 1),
        ("cent re", ("centre",), "Regular Text Recognition", 0),
        ("two\nwords", ("two words",), "Regular Text Recognition", 1),
        ("x ^ 2", ("x^2", "y"), FORMULA, 1),
        ("X^2", ("x^2",), FORMULA, 0),  # a formula's case counts
        ("", ("a",), "Doc-oriented VQA", 0),
    ],
)
def test_ocrbench_answers(answer: str, references: tuple[str, ...], kind: str, expected: float) -> None:
    known = get("ocrbench")
    question = Question("1", "?", "?", answer=references[0], references=references, category=kind)
    assert known.credit(question, "contains", known.parse(question, answer)["contains"]) == expected


def test_ocrbench_files(tmp_path: Path) -> None:
    kinds = ("Regular Text Recognition", "Handwriting Recognition", FORMULA)
    rows = [
        {"dataset": "svt", "question": "what is written in the image?", "question_type": kind, "answer": ["A", "word"],
         "image": image_bytes(n)}
        for n, kind in enumerate(kinds)
    ]  # fmt: skip
    hub = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    save_image(tmp_path / "OCRBench_Images" / "a.png")
    release = write_json(
        tmp_path / "OCRBench.json",
        [{"dataset_name": "svt", "type": row["question_type"], "question": row["question"], "image_path": "a.png",
          "answers": "word" if n else ["word"]} for n, row in enumerate(rows)],
    )  # fmt: skip
    for number, data in enumerate((hub, release)):
        said = {"0": "a WORD", "1": "w", "2": "word"}
        report = evaluate("ocrbench", data, FakeAnswerer(lambda q, said=said: said[q.id]), tmp_path / f"out{number}")
        found = values(report, "accuracy", "contains")
        assert (found["overall"], found["Text Recognition"], found[FORMULA]) == (pytest.approx(2 / 3), 0.5, 1)
        assert read_dataset(get("ocrbench"), data).questions[0].prompt == "what is written in the image?"


def test_several_files_are_one_table(tmp_path: Path) -> None:
    rows = [{"type": "human_test", "question": f"{n}?", "answer": str(n), "image": image_bytes(7)} for n in range(4)]
    paths = [tmp_path / f"test-{n:05}-of-00002.parquet" for n in (0, 1)]
    for path, part in zip(paths, (rows[:3], rows[3:]), strict=True):
        write_parquet(path, part)
    questions = read_dataset(get("chartqa"), paths[0]).questions
    assert [question.id for question in questions] == ["0", "1", "2", "3"]
    assert questions[0].images[0] is questions[3].images[0]  # equal images are held once
    paths[1].unlink()
    with pytest.raises(UserError, match="file 2 of 2 is missing"):
        read_dataset(get("chartqa"), paths[0])


def test_damaged_tables(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"test\.parquet: not a Parquet file, or a damaged one"):
        read_dataset(get("chartqa"), path)
    write_parquet(path, [{"question": "How many?", "answer": "1", "image": None}])
    with pytest.raises(UserError, match=r"row 1, field 'image': an encoded image is expected"):
        read_dataset(get("chartqa"), path)
    write_parquet(path, [{"text": "How many?", "image": image_bytes()}])
    with pytest.raises(UserError, match=r"row 1, field 'query': missing. Found: text, image"):
        read_dataset(get("chartqa"), path)


def test_an_unreadable_image_counts_as_wrong(tmp_path: Path) -> None:
    rows = [{"type": "human_test", "question": "How many?", "answer": "1", "image": b"not an image"}]
    data = write_parquet(tmp_path / "test.parquet", rows)
    report = evaluate("chartqa", data, FakeAnswerer(knows), tmp_path / "out")
    assert values(report, "relaxed accuracy", "relaxed")["overall"] == 0
    assert report.num_errors == 1


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("chartqa", None, "empty"),
        ("chartqa", ["5", " "], "an answer is empty"),
        ("ocrbench", [""], "occurs in every answer"),
    ],
)
def test_true_answers_that_are_empty(tmp_path: Path, name: str, answer: Any, message: str) -> None:
    row = {"question": "Which?", "image": image_bytes(), "answer": answer, "question_type": "x"}
    with pytest.raises(UserError, match=f"row 1, field 'answer': .*{message}"):
        read_dataset(get(name), write_parquet(tmp_path / "test.parquet", [row]))
