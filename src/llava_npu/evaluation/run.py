"""Running a benchmark: questions in batches, predictions to disk, scores to a report; stopped anywhere, it goes on.

output/
  run.json            what is being evaluated: benchmark, data, model, settings; and every session that worked on it
  predictions.jsonl   one line a question, appended batch by batch
  submission/         files for the benchmark's server or tool, in its form, where it has one
  judgements.jsonl    what a judge model said, where one was asked
  report.json, report.md, scores.csv, differences.csv, samples.json, report.html    written when all are answered
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.evaluation.ablations import GIVEN, with_images
from llava_npu.evaluation.benchmarks import Benchmark, Parsed, get
from llava_npu.evaluation.formats.checksums import checksum_note, md5_of
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.image_fingerprints import fingerprint_all, fingerprint_images
from llava_npu.evaluation.judge.client import JudgeClient
from llava_npu.evaluation.judge.judging import judge_notes, judge_predictions, write_judgements
from llava_npu.evaluation.predictions import Prediction, append_predictions, replace_predictions
from llava_npu.evaluation.processes import ALONE, Processes
from llava_npu.evaluation.questions import Answerer, Dataset, Question
from llava_npu.evaluation.reports.page import PageRun, ScoreTable, write_page
from llava_npu.evaluation.reports.report import Report, build_report, scores_by_rule, write_report
from llava_npu.evaluation.reports.submissions import write_submission
from llava_npu.evaluation.run_folder import (
    PREDICTIONS_FILE,
    Session,
    collect_predictions,
    keep_unchanged,
    new_session,
    open_run,
    predictions_path,
    session_notes,
)
from llava_npu.evaluation.statistics.accuracy import CATEGORY, L2_CATEGORY, OVERALL

__all__ = ["PREDICTIONS_FILE", "Progress", "evaluate", "order_questions", "read_dataset"]

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Progress:
    """How far a run is, after a batch (and once at its start); of several processes, each tells of its own share.

    Attributes:
        done, total: questions answered, and to be answered; or answers judged.
        resumed: how many of them an earlier session had answered.
        errors: how many could not be answered.
        judging: whether it is a judge that is at work.
    """

    done: int
    total: int
    resumed: int
    errors: int
    judging: bool = False


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
    processes: Processes = ALONE,
    page: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Puts every question of a benchmark to a model, scores the answers and writes a report.

    Call it again with the same arguments after an interruption, and it goes on where the last whole batch ended, with
    as many processes as there are then.

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
        processes: those that share the work (see `processes.joined`); each calls this with the same arguments.
        page: write report.html too, the page of all questions and answers.
        on_progress: called after every batch.

    Raises:
        UserError: bad data; or `output` holds something else, or a run of another model, data or settings, or is in
            use.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: at least 1.")
    benchmark = get(benchmark) if isinstance(benchmark, str) else benchmark
    output = Path(output)
    dataset = read_dataset(benchmark, Path(data))
    questions, image_notes = with_images(dataset.questions, images)

    names = [question.id for question in questions]
    sessions: list[Session] = []
    predictions: list[Prediction] = []
    resume_notes: list[str] = []
    with ExitStack() as stack:
        if processes.is_first:
            session = new_session(answerer.device, processes, command)
            identity = _identity(benchmark, dataset, answerer, images)
            sessions = stack.enter_context(open_run(output, identity, session, fresh))
            predictions, torn_notes = collect_predictions(output, names)
            predictions, changed_notes = keep_unchanged(output, questions, predictions)
            resume_notes = [*torn_notes, *changed_notes]
        predictions = processes.from_first(predictions)
        answered = {prediction.id for prediction in predictions}
        companies = order_questions([question for question in questions if question.id not in answered])
        mine = list(chain.from_iterable(processes.share(companies)))
        path = predictions_path(output, processes)
        tell = on_progress or (lambda progress: None)
        _answer_all(benchmark, answerer, mine, predictions, path, batch_size, tell)
        processes.wait()

        report = None
        if processes.is_first:
            predictions, _ = collect_predictions(output, names)
            predictions, rule_notes = _read_anew(benchmark, questions, predictions, output / PREDICTIONS_FILE)
            notes = [*image_notes, *resume_notes, *rule_notes, *session_notes(sessions)]
            image_files = fingerprint_all({prediction.id: prediction.image_files for prediction in predictions})
            provenance = {**identity, "image_files": image_files, "sessions": sessions}
            if benchmark.submission and images == GIVEN:
                texts = {prediction.id: prediction.answer for prediction in predictions}
                notes += write_submission(benchmark.submission, dataset, texts, output)[1]
            judged, judging_notes = _judged(benchmark, questions, predictions, judge, output, tell)
            notes += judging_notes
            report = _report(benchmark, dataset, questions, judged, notes, provenance, judge, output, page)
        report = processes.from_first(report)
        assert report is not None
        return report


def _report(
    benchmark: Benchmark,
    dataset: Dataset,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    notes: Sequence[str],
    provenance: Mapping[str, Any],
    judge: JudgeClient | None,
    output: Path,
    page: bool,
) -> Report:
    """Scores predictions and writes the report."""
    report = build_report(
        benchmark,
        dataset,
        questions,
        predictions,
        notes=[*dataset.notes, *_checksum_notes(benchmark, dataset.path), *notes],
        provenance={**provenance, "judge": judge and judge.settings.model},
    )
    write_report(report, output)
    if page:
        _write_page(benchmark, questions, predictions, report, output / PAGE_FILE)
    return report


def _write_page(
    benchmark: Benchmark, questions: Sequence[Question], predictions: Sequence[Prediction], report: Report, path: Path
) -> None:
    write_page(
        path,
        title=report.title,
        notes=report.notes,
        scores=[
            ScoreTable(*scores_by_rule(report, [OVERALL])),
            ScoreTable(*scores_by_rule(report, [L2_CATEGORY, CATEGORY]), folded="scores by category"),
        ],
        benchmark=benchmark,
        questions=questions,
        runs=[PageRun("answer", {prediction.id: prediction for prediction in predictions})],
    )


def _checksum_notes(benchmark: Benchmark, data: Path) -> list[str]:
    # Only the tables of VLMEvalKit have published sums.
    if not benchmark.checksums or data.suffix != ".tsv":
        return []
    return [checksum_note(data, md5_of(data), benchmark.checksums)]


def _judged(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    judge: JudgeClient | None,
    output: Path,
    report_progress: Callable[[Progress], None],
) -> tuple[Sequence[Prediction], list[str]]:
    """Has answers judged where a benchmark wants that."""
    rule = benchmark.judging
    if rule is None:
        return predictions, []
    if judge is None:
        missing = "No judge was given (--judge-url, --judge-model): predictions only, no score."
        return predictions, [missing] if rule.required else []
    judged, judgements = judge_predictions(
        rule, questions, predictions, judge, lambda done, total: report_progress(Progress(done, total, 0, 0, True))
    )
    write_judgements(judgements, output)
    return judged, judge_notes(rule, judgements, judge)


def order_questions(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions about the same images together, and those with the longest prompt first.

    Batches of like length waste little padding, and one that is too large fails at once; what prompts about one image
    begin with alike is computed once if they are in one batch (see `beginnings`).
    """
    companies: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in questions:
        companies[tuple(image.key for image in question.images)].append(question)
    for company in companies.values():
        company.sort(key=lambda question: (-len(question.prompt), question.group, question.rotation))
    return sorted(
        companies.values(),
        key=lambda company: (-len(company[0].images), -len(company[0].prompt), company[0].group, company[0].rotation),
    )


def _answer_all(
    benchmark: Benchmark,
    answerer: Answerer,
    questions: Sequence[Question],
    earlier: Sequence[Prediction],
    path: Path,
    batch_size: int,
    report_progress: Callable[[Progress], None],
) -> None:
    """Answers and stores batch by batch."""
    total = len(earlier) + len(questions)
    errors = sum(prediction.error is not None for prediction in earlier)
    done = len(earlier)
    report_progress(Progress(done, total, len(earlier), errors))
    for batch in _batches(questions, batch_size):
        new = _answer(benchmark, answerer, batch)
        append_predictions(path, new)
        done += len(new)
        errors += sum(prediction.error is not None for prediction in new)
        report_progress(Progress(done, total, len(earlier), errors))


def _answer(benchmark: Benchmark, answerer: Answerer, batch: Sequence[Question]) -> list[Prediction]:
    started = time.perf_counter()
    answers = answerer.answer(batch)
    seconds = (time.perf_counter() - started) / len(batch)
    return [
        Prediction(
            id=question.id,
            prompt=answer.prompt,
            answer=answer.text,
            parsed=_readings(benchmark, question, answer.text, answer.error),
            truth=question.answer,
            seconds=round(seconds, 6),
            error=answer.error,
            scores=dict(answer.scores) if answer.scores is not None else None,
            image_files=fingerprint_images(question.images),
        )
        for question, answer in zip(batch, answers, strict=True)
    ]


def _readings(benchmark: Benchmark, question: Question, answer: str, error: str | None) -> Parsed:
    # Without an answer there is nothing to read: an empty text must not happen to match an option.
    return dict.fromkeys(benchmark.parse(question, "")) if error else benchmark.parse(question, answer)


def _read_anew(
    benchmark: Benchmark, questions: Sequence[Question], predictions: Sequence[Prediction], path: Path
) -> tuple[list[Prediction], list[str]]:
    """Predictions as this version's rules read their answers; stored so if an earlier one's read them otherwise."""
    by_id = {question.id: question for question in questions}
    anew = [replace(each, parsed=_readings(benchmark, by_id[each.id], each.answer, each.error)) for each in predictions]
    changed = sum(one.parsed != other.parsed for one, other in zip(anew, predictions, strict=True))
    if not changed:
        return anew, []
    replace_predictions(path, anew)
    return anew, [f"{changed} answers had been read by other rules (another version's?); they were read anew."]


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _identity(benchmark: Benchmark, dataset: Dataset, answerer: Answerer, images: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "dataset_sha256": dataset.sha256,
        "images": images,
        "model": answerer.fingerprint,
        **{f"settings.{name}": value for name, value in answerer.settings.items()},
    }
