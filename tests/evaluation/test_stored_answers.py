"""Answers from other programs' files, scored without a model."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llava_npu.cli.eval import eval_
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.submissions import as_spreadsheet
from llava_npu.evaluation.stored_answers import StoredAnswers
from support.benchmark_samples import gqa, mme, mmvet, seedbench, textvqa, vizwiz, write_jsonl
from support.evaluation_samples import circular_rows, write_tsv

app = typer.Typer()
app.command("eval")(eval_)


def score(name: str, data: Path, predictions: Path, output: Path) -> dict[tuple[str, str], float]:
    arguments = [name, "--data", data, "--predictions", predictions, "--output", output]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    report = json.loads((output / "report.json").read_text())
    return {(s["metric"], s["extraction"]): s["value"] for s in report["scores"] if s["level"] == "overall"}


def test_llava_answer_file(tmp_path: Path) -> None:
    # As model_vqa_loader.py writes it.
    answers = [
        {"question_id": 201, "prompt": "Is it 1?", "text": "Dining table.", "answer_id": "x", "model_id": "m"},
        {"question_id": 202, "prompt": "Is it 2?", "text": "yes", "answer_id": "y", "model_id": "m"},
    ]
    found = score("gqa", gqa(tmp_path), write_jsonl(tmp_path / "answers.jsonl", answers), tmp_path / "out")
    assert found == {("accuracy", "strict"): 0.5, ("accuracy", "llava"): 0.5}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["provenance"]["model"].startswith("sha256:")
    assert any("no model was run" in note for note in report["notes"])


def test_ids_that_stand_several_times_meet_by_prompt(tmp_path: Path) -> None:
    data = textvqa(tmp_path)  # two questions about one image: one id
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    answers = [
        {"question_id": "abc", "prompt": lines[1]["text"], "text": "red"},
        {"question_id": "abc", "prompt": lines[0]["text"], "text": "Coca Cola"},
    ]
    found = score("textvqa", data, write_jsonl(tmp_path / "answers.jsonl", answers), tmp_path / "out")
    assert found["VQA accuracy", "strict"] == 1

    data = mme(tmp_path, {"count": 1})
    said = [{"question_id": "count/0000.png", "text": text} for text in ("Yes", "No")]  # in order
    found = score("mme", data, write_jsonl(tmp_path / "mme.jsonl", said), tmp_path / "mme")
    assert found["score", "mme"] == 2  # in 0 … 1: accuracy and accuracy+


def test_vlmevalkit_spreadsheet(tmp_path: Path) -> None:
    rows = circular_rows(groups=2)
    data = write_tsv(tmp_path / "b.tsv", rows)
    table = [[int(str(row["index"])), str(row["question"]), str(row["answer"])] for row in rows]
    table[0][2] = None  # type: ignore[call-overload]
    path = tmp_path / "model_MMBench_DEV_EN.xlsx"
    path.write_bytes(as_spreadsheet(["index", "question", "prediction"], table))
    found = score("mmbench", data, path, tmp_path / "out")
    assert found["every rotation", "strict"] == 7 / 8
    assert found["circular", "vlmevalkit"] == 0.5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_errors"] == 1


def test_lmms_eval_sample_log(tmp_path: Path) -> None:
    rows = circular_rows(groups=1)
    data = write_tsv(tmp_path / "b.tsv", rows)
    log = [
        {"doc_id": place, "doc": {"index": row["index"], "question": "?"}, "target": row["answer"],
         "resps": [[f" {row['answer']}"]], "filtered_resps": [row["answer"]]}
        for place, row in enumerate(rows)
    ]  # fmt: skip
    found = score("mmbench", data, write_jsonl(tmp_path / "samples.jsonl", log), tmp_path / "out")
    assert found["circular", "strict"] == 1


def test_own_predictions_of_a_run(tmp_path: Path) -> None:
    data = mmvet(tmp_path)
    stored = [{"question_id": n, "text": f"It is {n}"} for n in range(3)]  # LLaVA's ids lack MM-Vet's "v1_"
    score("mmvet", data, write_jsonl(tmp_path / "a.jsonl", stored), tmp_path / "one")
    score("mmvet", data, tmp_path / "one" / "predictions.jsonl", tmp_path / "two")
    first, second = (json.loads((tmp_path / n / "submission" / "mm-vet.json").read_text()) for n in ("one", "two"))
    assert first == second == {f"v1_{n}": f"It is {n}" for n in range(3)}


def questions(name: str, data: Path) -> tuple[Question, ...]:
    return read_dataset(get(name), data).questions


def test_answers_to_other_questions_are_refused_and_named(tmp_path: Path) -> None:
    data = gqa(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"question_id": n, "text": "no"} for n in (201, 7, "\x00", 9, 10)])
    with pytest.raises(
        UserError, match=r"4 of its 5 answers are to other questions \(first: 7, \\x00, 9\), and 1 of 2"
    ):
        StoredAnswers(path, questions("gqa", data))


def test_more_answers_than_questions_are_noted_and_fewer_count_as_wrong(tmp_path: Path) -> None:
    data = seedbench(tmp_path)  # its video question is left out, LLaVA's answer file has it
    said = [{"question_id": name, "text": "A"} for name in (0, 1, "v2")]
    answers = StoredAnswers(write_jsonl(tmp_path / "a.jsonl", said), questions("seedbench", data))
    assert "1 answers are to questions that are not asked here (first: v2)" in answers.notes[1]
    found = score("gqa", gqa(tmp_path), write_jsonl(tmp_path / "b.jsonl", [{"question_id": 202, "text": "no"}]),
                  tmp_path / "out")  # fmt: skip
    assert found["accuracy", "strict"] == 0.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": 1}\n', "line 1: not an answer. Expected are question_id and text"),
        ("a.jsonl", "[1]\n", "line 1: an object is expected"),
        ("a.jsonl", '{"question_id": null, "text": "a"}\n', "line 1: the answer names no question"),
        ("a.tsv", "index\tanswer\n1\tA\n", "no column 'prediction'. Columns found: index, answer"),
        ("a.tsv", "index\tprediction\n\tA\n", "row 1, column 'index': empty"),
        ("a.csv", "index,prediction\n1,a, b\n", r"row 1 .*3 fields, but the header has 2 columns"),
        ("a.csv", 'index,prediction\n1,"a\n2,b\n', "row 1 .*not a valid comma-separated row"),
        ("a.csv", "index\tprediction\n", "Is it separated by commas"),
        ("a.csv", "index,prediction\n1,A\n1,B\n", "answers question 1 twice, and differently: 'A' and 'B'"),
        ("a.json", "[]", "an empty list"),
        ("a.jsonl", '{"doc_id": 1, "resps": [[[-0.5, false]]]}', r"'resps' holds a likelihood \(-0.5\)"),
        ("a.jsonl", '{"question_id": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("a.xlsx", "not a spreadsheet", "is not a readable .xlsx file"),
        ("a.jsonl", '{"id": 1, "answer": "A", "response": "B"}', "line 1: has both 'answer' and 'response'"),
        ("a.jsonl", '{"id": 1, "answer": "A", "answer": "B"}', "line 1: .*'answer' is given twice"),
        ("a.jsonl", '{"question_id": 1, "text": "?", "image": "a.png"}', "holds the questions, not answers to them"),
        ("a.pkl", "x", ".jsonl, .xlsx, .tsv or .csv is expected"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        StoredAnswers(tmp_path / name, [Question("1", "?", "?")])


def test_equal_answers_that_stand_twice_are_counted_once(tmp_path: Path) -> None:
    # lmms-eval's processes pad their shares with questions that others have too.
    asked = [Question("1", "?", "?"), Question("2", "?", "?")]
    (tmp_path / "a.json").write_text('[{"index": 1, "prediction": "A"}, {"index": 1, "prediction": "A"}]')
    answers = StoredAnswers(tmp_path / "a.json", asked)
    assert [each.text for each in answers.answer(asked)] == ["A", ""]
    assert answers.notes[1] == "1 answers stand there twice, equal (first: 1): counted once."


def test_prompts_of_other_questions_are_refused_although_the_ids_meet(tmp_path: Path) -> None:
    asked = [Question(str(n), f"What is {n}?", f"What is {n}?\nBriefly.") for n in range(3)]
    lines = [{"question_id": n, "prompt": f"Who is {n}?", "text": "x"} for n in range(3)]
    with pytest.raises(UserError, match=r"3 of its 3 prompts ask something else .*\(first: 0 is 'What is 0\?', and"):
        StoredAnswers(write_jsonl(tmp_path / "a.jsonl", lines), asked)
    lines[:2] = [{**line, "prompt": f"<image>\nwhat  is {n}?"} for n, line in enumerate(lines[:2])]
    assert "1 of its 3 prompts" in StoredAnswers(write_jsonl(tmp_path / "b.jsonl", lines), asked).notes[1]


def test_half_an_emoji_is_spelled_as_a_replacement(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question_id": 201, "text": "yes \\ud83d", "prompt": "Is it 1? \\ud83d"}')
    assert score("gqa", gqa(tmp_path), tmp_path / "a.jsonl", tmp_path / "out")["accuracy", "llava"] == 0
    assert "yes \ufffd" in (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8")


def test_the_right_answers_beside_the_models_are_not_scored(tmp_path: Path) -> None:
    asked = [Question("1", "?", "?")]
    lines = [{"id": 1, "index": 1, "answer": "A", "prediction": "B"}]
    assert StoredAnswers(write_jsonl(tmp_path / "a.jsonl", lines), asked).answer(asked)[0].text == "B"


def test_an_answer_that_a_spreadsheet_took_for_a_date(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(as_spreadsheet(["index", "prediction"], [[1, datetime(2026, 3, 4)]]))  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"row 1, column 'prediction': a date or time \(2026-03-04"):
        StoredAnswers(path, [Question("1", "?", "?")])


def test_places_counted_from_0_are_no_ids(tmp_path: Path) -> None:
    asked = [Question(str(n), f"What is {n}?", f"What is {n}?") for n in range(1, 4)]
    log = [{"doc_id": n, "doc": {"question": f"What is {n + 1}?"}, "resps": [["x"]]} for n in range(4)]
    with pytest.raises(UserError, match="3 of its 3 prompts ask something else"):
        StoredAnswers(write_jsonl(tmp_path / "a.jsonl", log), asked)


def test_nan_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question_id": 1, "text": NaN}\n{"question_id": 2, "text": "nan"}\n')
    one, two = StoredAnswers(path, asked := [Question("1", "?", "?"), Question("2", "?", "?")]).answer(asked)
    assert one.error == "a.jsonl has no answer to it"
    assert (two.text, two.error) == ("nan", None)


def test_options_that_do_not_go_with_stored_answers(tmp_path: Path) -> None:
    def refused(*more: str) -> Any:
        arguments = ["gqa", "--data", str(gqa(tmp_path)), "--predictions", "x.jsonl", "--output", "out", *more]
        return str(CliRunner().invoke(app, arguments).exception)

    assert "leave out --model" in refused("--model", "m")
    assert "takes one benchmark, with --images given" in refused("--images", "none")
    assert "x.jsonl is not a file" in refused()


def test_a_released_test_file_is_scored_without_the_model(tmp_path: Path) -> None:
    rows = circular_rows(groups=2)
    secret = write_tsv(tmp_path / "MMBench_TEST_EN_V11.tsv", [{**row, "answer": ""} for row in rows])
    answers = [{"question_id": row["index"], "text": row["answer"]} for row in rows]
    score("mmbench_test", secret, write_jsonl(tmp_path / "a.jsonl", answers), tmp_path / "old")
    notes = json.loads((tmp_path / "old" / "report.json").read_text())["notes"]
    assert any("closed since 2026-03-31" in note and "MMBench_TEST_EN_V11.tsv" in note for note in notes)
    released = write_tsv(tmp_path / "released.tsv", rows)
    found = score("mmbench_test", released, tmp_path / "old" / "predictions.jsonl", tmp_path / "new")
    assert found["circular", "vlmevalkit"] == 1
    notes = json.loads((tmp_path / "new" / "report.json").read_text())["notes"]
    assert not any("closed" in note for note in notes)


def test_vizwiz_says_what_to_do_now(tmp_path: Path) -> None:
    data = vizwiz(tmp_path)
    answers = write_jsonl(tmp_path / "a.jsonl", [{"question_id": 0, "text": "a can"}])
    score("vizwiz", data, answers, tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert any("challenge 2185 takes no more submissions" in note for note in notes)
    record = json.loads(data.read_text())
    write_jsonl(data, [{**record, "answers": ["a can"] * 10}])
    assert score("vizwiz", data, answers, tmp_path / "scored")["VQA accuracy", "llava"] == 1
