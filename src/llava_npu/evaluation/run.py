"""Running a benchmark: questions in batches, predictions to disk, scores to a report. An interrupted run resumes.

output/
  run.json            what is evaluated: benchmark, data, model, settings; and every session that worked on it
  predictions.jsonl   one line per question, appended batch by batch
  submission/         files for the benchmark's server or tool, in its format, where it has one
  judgements.jsonl    what a judge model replied, where one was asked
  report.json, report.md, scores.csv, differences.csv, samples.json, report.html    written when all are answered
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.evaluation.ablations import GIVEN, with_images
from llava_npu.evaluation.benchmarks import Benchmark, Parsed, get
from llava_npu.evaluation.fingerprints import fingerprint_all, fingerprint_images
from llava_npu.evaluation.formats.datasets import checksum_notes, read_dataset
from llava_npu.evaluation.judge.client import JudgeClient
from llava_npu.evaluation.judge.judging import judge_notes, judge_predictions, write_judgements
from llava_npu.evaluation.predictions import Prediction, append_predictions, replace_predictions
from llava_npu.evaluation.processes import ALONE, Processes
from llava_npu.evaluation.questions import Answer, Answerer, Dataset, Question
from llava_npu.evaluation.reports.page import PageRun, QuestionsPage, write_page
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

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Progress:
    """How far a run is, after a batch (and once at its start); each of several processes reports its own share.

    Attributes:
        done, total: questions answered, and to be answered; or answers judged.
        resumed: how many of them an earlier session had answered.
        errors: how many could not be answered.
        judging: whether a judge is at work.
    """

    done: int
    total: int
    resumed: int
    errors: int
    judging: bool = False


@dataclass(frozen=True)
class EvaluationOptions:
    """How a benchmark is put to a model.

    Attributes:
        images: "given"; or "none" or "shuffled" for the baselines (see `ablations`).
        batch_size: questions answered at once. It does not change answers, so it may differ when a run is resumed.
        fresh: discard what the run's folder holds of an earlier run.
        command: recorded in the report; by default this process's command line.
        judge: asked where the benchmark wants a judge's reading. Without one, only what needs none is scored.
        processes: those that share the work (see `processes.joined`); each evaluates with the same arguments.
        page: write report.html too, the page of all questions and answers.
        on_progress: called after every batch.
    """

    images: str = GIVEN
    batch_size: int = 8
    fresh: bool = False
    command: str | None = None
    judge: JudgeClient | None = None
    processes: Processes = ALONE
    page: bool = True
    on_progress: Callable[[Progress], None] = lambda progress: None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}: at least 1 is needed.")


@dataclass(frozen=True)
class EvaluationRun:
    """One benchmark put to one model: all that its stations need.

    Attributes:
        benchmark, dataset: what is asked.
        questions: of the dataset, with images as the options want them.
        answerer: what answers.
        output: the run's folder.
    """

    benchmark: Benchmark
    dataset: Dataset
    questions: tuple[Question, ...]
    answerer: Answerer
    output: Path
    options: EvaluationOptions

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        return {
            "benchmark": self.benchmark.name,
            "dataset_sha256": self.dataset.sha256,
            "images": self.options.images,
            "model": self.answerer.fingerprint,
            **{f"settings.{name}": value for name, value in self.answerer.settings.items()},
        }

    @property
    def predictions_file(self) -> Path:
        return self.output / PREDICTIONS_FILE

    def readings(self, question: Question, answer: str, error: str | None) -> Parsed:
        """What each extraction rule reads from an answer."""
        # Without an answer there is nothing to read: an empty text must not happen to match an option.
        parse = self.benchmark.parse
        return dict.fromkeys(parse(question, "")) if error else parse(question, answer)


def evaluate(
    benchmark: str | Benchmark,
    data: str | Path,
    answerer: Answerer,
    output: str | Path,
    options: EvaluationOptions = EvaluationOptions(),
) -> Report:
    """Puts every question of a benchmark to a model, scores the answers and writes a report.

    Call it again with the same arguments after an interruption: it resumes after the last whole batch, with any number
    of processes.

    Args:
        benchmark: its name, or the benchmark itself.
        data: its file, or a folder that holds it under a name of `Benchmark.files`.
        answerer: what answers.
        output: folder of this run; new, empty, or one that an interrupted run left.
        options: how it is done.

    Raises:
        UserError: bad data; or `output` holds something else, or a run of another model, data or settings, or is in
            use.
    """
    known = get(benchmark) if isinstance(benchmark, str) else benchmark
    dataset = read_dataset(known, Path(data))
    asked, notes = with_images(dataset.questions, options.images)
    run = EvaluationRun(known, dataset, asked, answerer, Path(output), options)
    report, sessions, earlier = None, list[Session](), list[Prediction]()
    processes = options.processes
    with ExitStack() as stack:
        if processes.is_first:
            session = new_session(answerer.device, processes, options.command)
            sessions = stack.enter_context(open_run(run.output, run.identity, session, options.fresh))
            earlier, resume_notes = _earlier_predictions(run)
            notes = (*notes, *resume_notes)
        _answer_rest(run, processes.from_first(earlier))
        processes.wait()
        if processes.is_first:
            report = _finish(run, sessions, notes)
        report = processes.from_first(report)
    assert report is not None
    return report


# --- asking -----------------------------------------------------------------------------------------------------------


def order_questions(questions: Sequence[Question]) -> list[list[Question]]:
    """Groups of questions about the same images, those with the longest prompt first.

    Batches of similar length waste little padding, and one that is too large fails at once; what the prompts about one
    image have in common is computed once if they are in one batch (see `inference.prefix_cache`).
    """
    image_groups: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in questions:
        image_groups[tuple(image.key for image in question.images)].append(question)
    for group in image_groups.values():
        group.sort(key=lambda question: (-len(question.prompt), question.group, question.rotation))
    return sorted(
        image_groups.values(),
        key=lambda group: (-len(group[0].images), -len(group[0].prompt), group[0].group, group[0].rotation),
    )


def _earlier_predictions(run: EvaluationRun) -> tuple[list[Prediction], list[str]]:
    """What an interrupted run left that still holds, and notes."""
    predictions, torn_notes = collect_predictions(run.output, [question.id for question in run.questions])
    predictions, changed_notes = keep_unchanged(run.output, run.questions, predictions)
    return predictions, [*torn_notes, *changed_notes]


def _answer_rest(run: EvaluationRun, earlier: Sequence[Prediction]) -> None:
    """Answers and stores this process's share of what is missing, batch by batch."""
    answered = {prediction.id for prediction in earlier}
    image_groups = order_questions([question for question in run.questions if question.id not in answered])
    questions = list(chain.from_iterable(run.options.processes.share(image_groups)))
    total = len(earlier) + len(questions)
    done, errors = len(earlier), sum(prediction.error is not None for prediction in earlier)
    run.options.on_progress(Progress(done, total, len(earlier), errors))
    for batch in _batches(questions, run.options.batch_size):
        new = _answer(run, batch)
        append_predictions(predictions_path(run.output, run.options.processes), new)
        done += len(new)
        errors += sum(prediction.error is not None for prediction in new)
        run.options.on_progress(Progress(done, total, len(earlier), errors))


def _answer(run: EvaluationRun, batch: Sequence[Question]) -> list[Prediction]:
    started = time.perf_counter()
    usable = [question for question in batch if not question.defect]
    found = run.answerer.answer(usable) if usable else []
    answers = {question.id: answer for question, answer in zip(usable, found, strict=True)}
    answers |= {each.id: Answer(each.prompt, "", error=each.defect) for each in batch if each.defect}
    seconds = (time.perf_counter() - started) / len(batch)
    return [_prediction(run, question, answers[question.id], seconds) for question in batch]


def _prediction(run: EvaluationRun, question: Question, answer: Answer, seconds: float) -> Prediction:
    return Prediction(
        id=question.id,
        prompt=answer.prompt,
        answer=answer.text,
        parsed=run.readings(question, answer.text, answer.error),
        truth=question.answer,
        seconds=round(seconds, 6),
        error=answer.error,
        scores=dict(answer.scores) if answer.scores is not None else None,
        image_files=fingerprint_images(question.images),
    )


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


# --- scoring ----------------------------------------------------------------------------------------------------------


def _finish(run: EvaluationRun, sessions: list[Session], notes: Sequence[str]) -> Report:
    """Everything after the last answer: submission, judge, scores, report."""
    predictions, _ = collect_predictions(run.output, [question.id for question in run.questions])
    predictions, rule_notes = _read_again(run, predictions)
    notes = [*notes, *rule_notes, *session_notes(sessions), *getattr(run.answerer, "notes", ())]
    if run.benchmark.submission and run.options.images == GIVEN:
        texts = {prediction.id: prediction.answer for prediction in predictions}
        notes += write_submission(run.benchmark.submission, run.dataset, texts, run.output)[1]
    if run.benchmark.closed and not any(each.references or each.answer is not None for each in run.questions):
        notes.append(f"No question has an answer here, and {run.benchmark.closed}")
    judged, judging_notes = _judged(run, predictions)
    report = build_report(
        run.benchmark,
        replace(run.dataset, questions=run.questions),
        judged,
        notes=[*run.dataset.notes, *checksum_notes(run.benchmark, run.dataset.path), *notes, *judging_notes],
        provenance={
            **run.identity,
            "image_files": fingerprint_all({prediction.id: prediction.image_files for prediction in predictions}),
            "sessions": sessions,
            "judge": run.options.judge and run.options.judge.settings.model,
        },
    )
    write_report(report, run.output)
    if run.options.page:
        _write_page(run, judged, report)
    return report


def _read_again(run: EvaluationRun, predictions: Sequence[Prediction]) -> tuple[list[Prediction], list[str]]:
    """Predictions as this version's rules read their answers; stored if an earlier version's rules differed."""
    by_id = {question.id: question for question in run.questions}
    again = [
        replace(each, parsed=run.readings(by_id[each.id], each.answer, each.error), truth=by_id[each.id].answer)
        for each in predictions
    ]
    changed = sum(one.parsed != other.parsed for one, other in zip(again, predictions, strict=True))
    if not changed:
        return again, []
    replace_predictions(run.predictions_file, again)
    return again, [f"{changed} answers had been read by other rules (another version's?); they were read again."]


def _judged(run: EvaluationRun, predictions: Sequence[Prediction]) -> tuple[Sequence[Prediction], list[str]]:
    """Has answers judged where the benchmark wants that."""
    rule = run.benchmark.judging
    if rule is None:
        return predictions, []
    if run.options.judge is None:
        missing = "No judge was given (--judge-url, --judge-model): predictions only, no score."
        return predictions, [missing] if rule.required else []
    judged, judgements = judge_predictions(
        rule,
        run.questions,
        predictions,
        run.options.judge,
        lambda done, total: run.options.on_progress(Progress(done, total, 0, 0, judging=True)),
    )
    write_judgements(judgements, run.output)
    return judged, judge_notes(rule, judgements, run.options.judge)


def _write_page(run: EvaluationRun, predictions: Sequence[Prediction], report: Report) -> None:
    page = QuestionsPage(
        title=report.title,
        notes=report.notes,
        scores={
            "": scores_by_rule(report, [OVERALL]),
            "scores by category": scores_by_rule(report, [L2_CATEGORY, CATEGORY]),
        },
        benchmark=run.benchmark,
        questions=run.questions,
        runs=[PageRun("answer", {prediction.id: prediction for prediction in predictions})],
    )
    write_page(run.output / PAGE_FILE, page)
