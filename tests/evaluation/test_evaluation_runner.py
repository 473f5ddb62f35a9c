"""Running, resuming, refusing: what is on the disk after whatever happens."""

from __future__ import annotations

import base64
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from llava_npu.errors import UserError
from llava_npu.evaluation.predictions import Prediction, append_predictions, read_predictions
from llava_npu.evaluation.questions import Answer, Question
from llava_npu.evaluation.reports.report import Report, as_terminal
from llava_npu.evaluation.run import EvaluationOptions, Progress, evaluate
from support.evaluation_samples import FakeAnswerer, always_a, circular_rows, knows, question_row, write_tsv


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "bench.tsv", circular_rows(groups=6))


def lines_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_scores_of_a_model_that_knows_and_of_one_that_always_says_a(bench: Path, tmp_path: Path) -> None:
    right = evaluate("mmbench", bench, FakeAnswerer(knows), tmp_path / "right")
    assert {score.value for score in right.scores} == {1.0}
    biased = evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "biased")
    assert biased.overall("circular").value == 0
    assert biased.overall("vanilla").value == 1  # rotation 0 has its answer at A
    assert biased.overall("every rotation").value == 0.25
    assert biased.overall("circular", "vlmevalkit").count == 6


def test_every_question_is_asked_once_and_recorded(bench: Path, tmp_path: Path) -> None:
    answerer = FakeAnswerer(lambda question: f"The answer is {question.answer}.")
    evaluate("mmbench", bench, answerer, tmp_path / "out", EvaluationOptions(batch_size=5))
    assert [len(batch) for batch in answerer.batches] == [5, 5, 5, 5, 4]
    lines = lines_of(tmp_path / "out")
    assert sorted(str(line["id"]) for line in lines) == sorted(answerer.asked)
    first = lines[0]
    assert first["answer"] == f"The answer is {first['truth']}."
    assert first["parsed"] == {"strict": first["truth"], "vlmevalkit": first["truth"]}
    assert str(first["prompt"]).endswith("Answer with the option's letter from the given choices directly.")
    assert isinstance(first["seconds"], float)


def test_longest_questions_first_and_rotations_together(tmp_path: Path) -> None:
    rows = circular_rows(groups=3)
    for row in rows:
        if int(str(row["index"])) % 1_000_000 == 2:
            row["hint"] = "a long hint " * 9
    answerer = FakeAnswerer(knows)
    evaluate(
        "mmbench", write_tsv(tmp_path / "b.tsv", rows), answerer, tmp_path / "out", EvaluationOptions(batch_size=4)
    )
    assert [{int(name) % 1_000_000 for name in batch} for batch in answerer.batches] == [{2}, {1}, {3}]


def test_progress_is_told(bench: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    evaluate(
        "mmbench",
        bench,
        FakeAnswerer(knows),
        tmp_path / "out",
        EvaluationOptions(batch_size=10, on_progress=seen.append),
    )
    assert [(progress.done, progress.total, progress.errors) for progress in seen] == [
        (0, 24, 0), (10, 24, 0), (20, 24, 0), (24, 24, 0)
    ]  # fmt: skip


def test_unreadable_image_counts_as_wrong_and_is_reported(tmp_path: Path) -> None:
    damaged = base64.b64encode(b"this is not an image, whatever it says, and long enough for one").decode()
    rows = [question_row(1, ["A", "x"], 0), question_row(2, ["A", "x"], 0, image=damaged)]
    report = evaluate("multiple_choice", write_tsv(tmp_path / "b.tsv", rows), FakeAnswerer(always_a), tmp_path / "out")
    assert report.overall("vanilla").value == 0.5
    assert report.overall("vanilla").count == 2
    assert report.num_errors == 1
    assert any("1 questions could not be answered and count as wrong: 2: " in note for note in report.notes)
    (failed,) = [line for line in lines_of(tmp_path / "out") if line["error"]]
    assert failed["parsed"] == {"strict": None, "vlmevalkit": None}


def test_secret_answers_give_predictions_and_no_scores(tmp_path: Path) -> None:
    rows = [{**row, "answer": ""} for row in circular_rows(groups=2)]
    report = evaluate("mmbench", write_tsv(tmp_path / "b.tsv", rows), FakeAnswerer(always_a), tmp_path / "out")
    assert report.scores == ()
    assert {line["answer"] for line in lines_of(tmp_path / "out")} == {"A"}
    assert "8 of 8 rows have no answer" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    Console(file=open(os.devnull, "w")).print(as_terminal(report))  # noqa: SIM115, PTH123


# --- resuming ---------------------------------------------------------------------------------------------------------


class InterruptedRunError(Exception):
    pass


class InterruptedAnswerer(FakeAnswerer):
    """Answers some batches, then is stopped."""

    def __init__(self, batches: int):
        super().__init__(always_a)
        self._allowed = batches

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        if len(self.batches) == self._allowed:
            raise InterruptedRunError
        return super().answer(questions)


def test_goes_on_where_it_was_interrupted(bench: Path, tmp_path: Path) -> None:
    first = InterruptedAnswerer(2)
    with pytest.raises(InterruptedRunError):
        evaluate("mmbench", bench, first, tmp_path / "out", EvaluationOptions(batch_size=5))
    assert len(lines_of(tmp_path / "out")) == 10
    second = FakeAnswerer(always_a)
    report = evaluate("mmbench", bench, second, tmp_path / "out", EvaluationOptions(batch_size=3))
    assert sorted(first.asked + second.asked) == sorted(str(line["id"]) for line in lines_of(tmp_path / "out"))
    assert not set(first.asked) & set(second.asked)
    whole = evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "whole")
    assert report.scores == whole.scores
    assert any("2 sessions" in note for note in report.notes)


@pytest.mark.parametrize("torn", [b'{"id": "3", "prom', b'{"id": "3"}', b"\0\0\0\0\n", b"\xff"])
def test_torn_last_line_is_cut_and_reported(bench: Path, tmp_path: Path, torn: bytes) -> None:
    with pytest.raises(InterruptedRunError):
        evaluate("mmbench", bench, InterruptedAnswerer(2), tmp_path / "out", EvaluationOptions(batch_size=5))
    with (tmp_path / "out" / "predictions.jsonl").open("ab") as file:
        file.write(torn)
    report = evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")
    assert len(lines_of(tmp_path / "out")) == 24
    assert any(f"torn last line ({len(torn)} bytes)" in note for note in report.notes)


def test_damage_before_the_last_line_is_an_error(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        evaluate("mmbench", bench, InterruptedAnswerer(2), tmp_path / "out", EvaluationOptions(batch_size=5))
    path = tmp_path / "out" / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{broken\n", *lines[4:]]))
    with pytest.raises(UserError, match=r"predictions.jsonl, line 4: not a prediction"):
        evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")
    path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(UserError, match=r"line 11: question \d+ was already answered in line 1"):
        evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")


def test_finished_run_is_only_scored_again(bench: Path, tmp_path: Path) -> None:
    evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")
    again = FakeAnswerer(always_a)
    report = evaluate("mmbench", bench, again, tmp_path / "out")
    assert again.batches == []
    assert report.overall("every rotation").value == 0.25


def test_stored_answers_are_read_by_this_versions_rules(bench: Path, tmp_path: Path) -> None:
    evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    stored = path.read_text(encoding="utf-8")
    path.write_text(stored.replace('"strict": "A"', '"strict": "B"', 3), encoding="utf-8")
    report = evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")
    assert report.overall("every rotation").value == 0.25
    assert "3 answers had been read by other rules (another version's?); they were read again." in report.notes
    assert path.read_text(encoding="utf-8") == stored


def test_other_model_or_settings_are_refused_with_the_difference(bench: Path, tmp_path: Path) -> None:
    evaluate("mmbench", bench, FakeAnswerer(always_a, "sha256:one", max_new_tokens=8), tmp_path / "out")
    other = FakeAnswerer(knows, "sha256:two", max_new_tokens=16)
    with pytest.raises(UserError) as error:
        evaluate("mmbench", bench, other, tmp_path / "out", EvaluationOptions(images="none"))
    message = str(error.value)
    assert "images: 'given' → 'none'" in message
    assert "model: 'sha256:one' → 'sha256:two'" in message
    assert "settings.max_new_tokens: 8 → 16" in message
    assert "benchmark" not in message
    assert other.batches == []
    report = evaluate("mmbench", bench, other, tmp_path / "out", EvaluationOptions(fresh=True))
    assert report.overall("circular").value == 1
    assert len(lines_of(tmp_path / "out")) == 24


def test_changed_data_is_refused(bench: Path, tmp_path: Path) -> None:
    evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")
    write_tsv(bench, circular_rows(groups=7))
    with pytest.raises(UserError, match="dataset_sha256: "):
        evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")


def test_folder_of_something_else_is_left_alone(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("…")
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"is not empty .* was not created by `llava-npu eval`"):
            evaluate("mmbench", bench, FakeAnswerer(knows), tmp_path / "precious", EvaluationOptions(fresh=fresh))
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.tex"]


def test_damaged_run_file(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is damaged"):
        evaluate("mmbench", bench, FakeAnswerer(knows), tmp_path / "out")


def test_bad_data_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "bench.tsv").write_text("index\n1\n")
    with pytest.raises(UserError):
        evaluate("mmbench", tmp_path / "bench.tsv", FakeAnswerer(knows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


_KILLED = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.evaluation_samples import FakeAnswerer, always_a
from llava_npu.evaluation.run import EvaluationOptions, evaluate

asked = []

def hang(question):
    asked.append(question)
    if len(asked) == 8:  # within the third batch
        signal.pause()
    return always_a(question)

evaluate("mmbench", Path(sys.argv[2]), FakeAnswerer(hang), Path(sys.argv[3]), EvaluationOptions(batch_size=3))
"""


@pytest.mark.slow
def test_kill_9_loses_at_most_the_batch_in_flight(bench: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    script = [sys.executable, "-c", _KILLED, str(Path(__file__).parents[1]), str(bench), str(output)]
    process = subprocess.Popen(script, stderr=subprocess.PIPE)
    predictions = output / "predictions.jsonl"
    deadline = time.monotonic() + 300  # a shared machine may be slow to start Python
    while not (predictions.exists() and predictions.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stderr is not None
    process.stderr.close()

    kept, _ = read_predictions(predictions)
    assert len(kept) == 6  # whole batches: nothing that was answered is lost
    rest = FakeAnswerer(always_a)
    report = evaluate("mmbench", bench, rest, output)
    assert len(rest.asked) == 18
    assert report.scores == evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "whole").scores


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    prediction = Prediction("1", "?", "A", {"strict": "A"}, "A", 0.1)
    with pytest.raises(UserError, match=r"/dev/full: cannot be written: No space left"):
        append_predictions(Path("/dev/full"), [prediction])


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path: Path) -> Report:
    rows = [row for row in circular_rows(groups=6) if row["index"] != 3_000_006]
    respond = {"1": "The answer is dog|cat", "2": "B"}
    answerer = FakeAnswerer(lambda question: respond.get(question.id, question.answer or ""))
    return evaluate(
        "mmbench",
        write_tsv(tmp_path / "bench.tsv", rows),
        answerer,
        tmp_path / "out",
        EvaluationOptions(command="the command"),
    )


def test_incomplete_groups_do_not_inflate_and_the_note_says_by_how_much(report: Report) -> None:
    assert report.overall("circular").value == pytest.approx(3 / 6)
    assert any("1 of 6 groups lack rotations" in note and "6 has 3 of 4" in note for note in report.notes)
    assert any("By the rule vlmevalkit those that are there count, as in VLMEvalKit" in note for note in report.notes)


def test_what_guessing_scores_is_said(report: Report) -> None:
    assert "Guessing would score 25.0% in the vanilla score." in report.notes
    assert "Guessing would score 0.3% in the circular score." in report.notes  # 5 complete groups of 6, 4⁻⁴ each


def test_report_files(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert stored["provenance"]["model"] == "sha256:fake"
    assert stored["provenance"]["sessions"][0]["command"] == "the command"
    assert set(stored["provenance"]["sessions"][0]["versions"]) >= {"llava-npu", "python", "torch", "transformers"}
    assert len(stored["provenance"]["dataset_sha256"]) == 64
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.scores) == 3 * 2 * 4  # metrics × rules × (overall, one l2-category, two categories)
    assert {row["level"] for row in rows} == {"overall", "l2-category", "category"}
    with (folder / "differences.csv").open(encoding="utf-8", newline="") as file:
        (difference,) = list(csv.DictReader(file))
    assert difference == {
        "id": "1", "truth": "A", "strict": "", "vlmevalkit": "D", "answer": "The answer is dog|cat"
    }  # fmt: skip
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        "| overall | 50.0 (16.7–83.3) | 66.7 (33.3–100.0) |" in page
    )  # VLMEvalKit scores the rotations that are there
    assert "the command" in page
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "differences.csv", "predictions.jsonl", "report.html", "report.json", "report.md", "run.json",
        "samples.json", "scores.csv", "submission"
    ]  # fmt: skip


def test_terminal_table(report: Report) -> None:
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(as_terminal(report))
    text = console.export_text()
    assert "16.7–83.3" in text
    assert "l2-category" in text
    assert "objects" in text
    assert "! 1 of 6 groups lack rotations" in text


def test_overall_asks_for_what_is_there(report: Report) -> None:
    with pytest.raises(KeyError, match="there are"):
        report.overall("circulair")


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        ("What is \ud83d?", "its text holds half of a surrogate pair"),
        ("<image>\nWhat is 2?", "its text contains '<image>', which stands for an image"),
        ("What is <image>, what <image>?", "its text contains '<image>', which stands for an image"),
    ],
)
def test_a_question_that_cannot_be_asked_costs_only_itself(tmp_path: Path, text: str, defect: str) -> None:
    lines = [{"question_id": n, "question": f"What is {n}?", "answer": "red"} for n in (1, 2, 3)]
    lines[1]["question"] = text
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answerer = FakeAnswerer(lambda question: "red")
    report = evaluate("vqa_jsonl", data, answerer, tmp_path / "out")
    assert sorted(answerer.asked) == ["1", "3"]
    assert report.overall("exact match").value == pytest.approx(2 / 3)
    assert f"1 questions could not be answered and count as wrong: 2: {defect}" in " ".join(report.notes)
