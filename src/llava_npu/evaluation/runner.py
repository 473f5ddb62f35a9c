"""Running a benchmark: questions in batches, predictions to disk, scores to a report; stopped anywhere, it goes on.

output/
  run.json            what is being evaluated: benchmark, data, model, settings; and every session that worked on it
  predictions.jsonl   one line a question, appended batch by batch
  submission/         files for the benchmark's server or tool, in its form, where it has one
  judgements.jsonl    what a judge model said, where one was asked
  report.json, report.md, scores.csv, differences.csv    written when all questions are answered
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.evaluation.ablations import GIVEN, with_images
from llava_npu.evaluation.benchmarks import Benchmark, get
from llava_npu.evaluation.checksums import checksum_note, md5_of
from llava_npu.evaluation.files import write_text
from llava_npu.evaluation.judge_client import JudgeClient
from llava_npu.evaluation.judging import judge_notes, judge_predictions, write_judgements
from llava_npu.evaluation.locating import check_pictures, find_data
from llava_npu.evaluation.predictions import Prediction, append_predictions, cut_torn_line, read_predictions
from llava_npu.evaluation.questions import Answerer, Dataset, Question
from llava_npu.evaluation.report import Report, build_report, write_report
from llava_npu.evaluation.submissions import write_submission
from llava_npu.version import __version__

RUN_FILE, PREDICTIONS_FILE = "run.json", "predictions.jsonl"
_PACKAGES = ("torch", "torch-npu", "transformers", "tokenizers", "pillow", "numpy")


@dataclass(frozen=True)
class Progress:
    """How far a run is, after a batch (and once at its start)."""

    done: int
    total: int
    resumed: int
    errors: int


def evaluate(
    benchmark: str | Benchmark,
    data: str | Path,
    answerer: Answerer,
    output: str | Path,
    *,
    images: str = GIVEN,
    batch_size: int = 8,
    fresh: bool = False,
    command: str | None = None,
    judge: JudgeClient | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Puts every question of a benchmark to a model, scores the answers and writes a report.

    Call it again with the same arguments after an interruption, and it goes on where the last whole batch ended.

    Args:
        benchmark: its name, or the benchmark itself.
        data: its file, or a folder that holds it under a name of `Benchmark.files`.
        answerer: what answers.
        output: folder of this run; new, empty, or one that an interrupted run left.
        images: "given"; or "none" or "shuffled" for the baselines (see `ablations`).
        batch_size: questions answered at once. It is no part of the run's identity: it does not change answers.
        fresh: throw away what `output` holds of an earlier run.
        command: recorded in the report; by default this process's command line.
        judge: asked where the benchmark wants a judge's reading. Without one, only what needs none is scored.
        on_progress: called after every batch.

    Raises:
        UserError: bad data; or `output` holds something else, or a run of another model, data or settings.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: at least 1.")
    benchmark = get(benchmark) if isinstance(benchmark, str) else benchmark
    output = Path(output)
    dataset = read_dataset(benchmark, Path(data))
    questions, image_notes = with_images(dataset.questions, images)

    identity = _identity(benchmark, dataset, answerer, images)
    sessions = _open_run(output, identity, _session(answerer, command), fresh)
    predictions, resume_notes = _earlier_predictions(output / PREDICTIONS_FILE, questions)

    answered = {prediction.id for prediction in predictions}
    resumed = len(answered)
    remaining = sort_by_length([question for question in questions if question.id not in answered])
    report_progress = on_progress or (lambda progress: None)
    report_progress(_progress(predictions, questions, resumed))
    for batch in _batches(remaining, batch_size):
        new = _answer(benchmark, answerer, batch)
        append_predictions(output / PREDICTIONS_FILE, new)
        predictions += new
        report_progress(_progress(predictions, questions, resumed))

    notes = [
        *dataset.notes,
        *_checksum_notes(benchmark, dataset.path),
        *image_notes,
        *resume_notes,
        *_session_notes(sessions),
    ]
    if benchmark.submission and images == GIVEN:
        texts = {prediction.id: prediction.answer for prediction in predictions}
        notes += write_submission(benchmark.submission, dataset, texts, output)[1]
    predictions, judging_notes = _judged(benchmark, questions, predictions, judge, output)
    report = build_report(
        benchmark,
        dataset,
        questions,
        predictions,
        notes=[*notes, *judging_notes],
        provenance={**identity, "judge": judge and judge.settings.model, "sessions": sessions},
    )
    write_report(report, output)
    return report


def read_dataset(benchmark: Benchmark, data: Path) -> Dataset:
    """Finds and reads a benchmark's data.

    Args:
        benchmark: the benchmark.
        data: its file, or a folder that holds it under a name of `Benchmark.files`.

    Raises:
        UserError: not found, bad data, no question in it, or none of its pictures is there.
    """
    dataset = benchmark.read(find_data(benchmark.name, benchmark.files, data))
    if not dataset.questions:
        raise UserError(f"{dataset.path} holds no question of {benchmark.title}.")
    check_pictures(dataset)
    return dataset


def _checksum_notes(benchmark: Benchmark, data: Path) -> list[str]:
    # Only the tables of VLMEvalKit have published sums.
    if not benchmark.checksums or data.suffix != ".tsv":
        return []
    return [checksum_note(data, md5_of(data), benchmark.checksums)]


def _judged(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: list[Prediction],
    judge: JudgeClient | None,
    output: Path,
) -> tuple[list[Prediction], list[str]]:
    rule = benchmark.judging
    if rule is None:
        return predictions, []
    if judge is None:
        missing = "No judge was given (--judge-url, --judge-model): predictions only, no score."
        return predictions, [missing] if rule.required else []
    judged, judgements = judge_predictions(rule, questions, predictions, judge)
    write_judgements(judgements, output)
    return judged, judge_notes(rule, judgements, judge)


def sort_by_length(questions: Sequence[Question]) -> list[Question]:
    """Longest prompts first: batches of like length waste little padding, and one that is too large fails at once.

    Rotations of a question are equally long, so they come one behind the other and share their image's features.
    """
    return sorted(
        questions,
        key=lambda question: (-len(question.images), -len(question.prompt), question.group, question.rotation),
    )


def _answer(benchmark: Benchmark, answerer: Answerer, batch: Sequence[Question]) -> list[Prediction]:
    started = time.perf_counter()
    answers = answerer.answer(batch)
    seconds = (time.perf_counter() - started) / len(batch)
    return [
        Prediction(
            id=question.id,
            prompt=answer.prompt,
            answer=answer.text,
            # Without an answer there is nothing to read: an empty text must not happen to match an option.
            parsed=dict.fromkeys(benchmark.parse(question, ""))
            if answer.error
            else benchmark.parse(question, answer.text),
            truth=question.answer,
            seconds=round(seconds, 6),
            error=answer.error,
            scores=dict(answer.scores) if answer.scores is not None else None,
        )
        for question, answer in zip(batch, answers, strict=True)
    ]


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _progress(predictions: Sequence[Prediction], questions: Sequence[Question], resumed: int) -> Progress:
    errors = sum(prediction.error is not None for prediction in predictions)
    return Progress(len(predictions), len(questions), resumed, errors)


# --- the run's identity, and what an earlier one left -----------------------------------------------------------------


def _identity(benchmark: Benchmark, dataset: Dataset, answerer: Answerer, images: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "dataset_sha256": dataset.sha256,
        "images": images,
        "model": answerer.fingerprint,
        **{f"settings.{name}": value for name, value in answerer.settings.items()},
    }


def _session(answerer: Answerer, command: str | None) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or shlex.join(sys.argv),
        "device": answerer.device,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"llava-npu": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # torch-npu is there on an NPU machine only
    return versions


def _open_run(output: Path, identity: Mapping[str, Any], session: dict[str, Any], fresh: bool) -> list[dict[str, Any]]:
    """Claims the output folder for this run; returns its sessions, this one last."""
    run_file = output / RUN_FILE
    sessions: list[dict[str, Any]] = []
    if run_file.exists():
        if fresh:
            (output / PREDICTIONS_FILE).unlink(missing_ok=True)
        else:
            earlier = _read_run(run_file)
            _check_identity(output, earlier["identity"], identity)
            sessions = earlier["sessions"]
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} is not empty, and no evaluation run of ours. Give another folder.")
    sessions = [*sessions, session]
    write_text(run_file, json.dumps({"identity": identity, "sessions": sessions}, indent=2, ensure_ascii=False) + "\n")
    return sessions


def _read_run(run_file: Path) -> dict[str, Any]:
    try:
        run = json.loads(run_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{run_file} is damaged: {error}. Start over with --fresh, or give another folder.") from error
    expected = {"identity": dict, "sessions": list}
    if not isinstance(run, dict) or any(not isinstance(run.get(key), kind) for key, kind in expected.items()):
        raise UserError(f"{run_file} is no run description of ours. Give another folder.")
    return run


def _check_identity(output: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if changed:
        lines = "\n".join(f"  {name}: was {earlier.get(name)!r}, is {now.get(name)!r}" for name in changed)
        raise UserError(
            f"output {output} holds a run with other settings:\n{lines}\n"
            "Give another folder to keep both, or --fresh to throw the earlier one away."
        )


def _earlier_predictions(path: Path, questions: Sequence[Question]) -> tuple[list[Prediction], list[str]]:
    predictions, whole = read_predictions(path)
    known = {question.id for question in questions}
    for prediction in predictions:
        if prediction.id not in known:
            raise UserError(f"{path}: question {prediction.id} is not in the data. Start over with --fresh.")
    torn = cut_torn_line(path, whole)
    notes = [f"An interrupted run had left a torn last line ({torn} bytes); it was answered anew."] if torn else []
    return predictions, notes


def _session_notes(sessions: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if len(sessions) > 1:
        notes.append(f"The run took {len(sessions)} sessions.")
    for what in ("device", "versions"):
        if any(session[what] != sessions[0][what] for session in sessions):
            notes.append(f"Its sessions differ in {what}: answers may differ in the last bits. See run.json.")
    return notes
