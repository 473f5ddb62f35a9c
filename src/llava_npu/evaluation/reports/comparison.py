"""Several runs of one benchmark side by side: their scores, and whether they differ from the first run's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import available
from llava_npu.evaluation.reports.samples import ScoreName, name_of, read_samples
from llava_npu.evaluation.run_folder import RUN_FILE
from llava_npu.evaluation.statistics.accuracy import LEVELS, SCORE_COLUMNS, Score, ScoreSample
from llava_npu.evaluation.statistics.significance import PairedDifference, paired_difference

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class FinishedRun:
    """A run as its folder tells of it.

    Attributes:
        label: what it is called in a comparison.
        folder: where it is.
        report: `report.json`, without its scores.
        scores: by name, as reported.
        samples: by name, of overall and l2-category scores.
    """

    label: str
    folder: Path
    report: Mapping[str, Any]
    scores: Mapping[ScoreName, Score]
    samples: Mapping[ScoreName, ScoreSample]

    @property
    def benchmark(self) -> str:
        return str(self.report["benchmark"])

    @property
    def dataset(self) -> str:
        return str(self.report["provenance"]["dataset_sha256"])


@dataclass(frozen=True)
class ComparedScore:
    """One score of all runs.

    Attributes:
        name: which score.
        scores: each run's; None where it has none.
        differences: each run's to the first one's; None for the first, and where there is nothing to compare.
    """

    name: ScoreName
    scores: tuple[Score | None, ...]
    differences: tuple[PairedDifference | None, ...]


@dataclass(frozen=True)
class RunComparison:
    """Runs of one benchmark.

    Attributes:
        benchmark, title: which one.
        runs: the first is what the others are compared with.
        rows: overall and l2-category scores.
        notes: what a reader should know.
    """

    benchmark: str
    title: str
    runs: tuple[FinishedRun, ...]
    rows: tuple[ComparedScore, ...]
    notes: tuple[str, ...]


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Reads finished runs; a folder that holds runs of several benchmarks stands for all of them.

    Raises:
        UserError: a folder holds no finished run, or its files are damaged.
    """
    available()  # whose statistics samples name
    labels = distinct_labels(folders)
    return [_read_run(run, label) for folder, label in zip(folders, labels, strict=True) for run in _runs_in(folder)]


def compare_runs(runs: Sequence[FinishedRun]) -> list[RunComparison]:
    """One comparison for each benchmark, in the order in which they appear."""
    return [
        _compare([run for run in runs if run.benchmark == benchmark])
        for benchmark in dict.fromkeys(run.benchmark for run in runs)
    ]


def _compare(runs: Sequence[FinishedRun]) -> RunComparison:
    first = runs[0]
    names = _ordered(dict.fromkeys(name for run in runs for name in run.samples))
    rows = tuple(
        ComparedScore(
            name,
            tuple(run.scores.get(name) for run in runs),
            (None, *(_difference(first, run, name) for run in runs[1:])),
        )
        for name in names
    )
    return RunComparison(first.benchmark, str(first.report["title"]), tuple(runs), rows, tuple(_notes(runs, rows)))


def _ordered(names: Iterable[ScoreName]) -> list[ScoreName]:
    """The rules of one metric side by side; all else as it was."""
    names = list(names)
    metrics, rules = (list(dict.fromkeys(getattr(name, field) for name in names)) for field in ("metric", "extraction"))
    return sorted(
        names,
        key=lambda name: (
            name.split,
            LEVELS.index(name.level),
            metrics.index(name.metric),
            rules.index(name.extraction),
        ),
    )


def _difference(first: FinishedRun, other: FinishedRun, name: ScoreName) -> PairedDifference | None:
    if first.dataset != other.dataset or name not in first.samples or name not in other.samples:
        return None
    return paired_difference(first.samples[name], other.samples[name])


def _notes(runs: Sequence[FinishedRun], rows: Sequence[ComparedScore]) -> Iterator[str]:
    first = runs[0]
    for run in runs[1:]:
        if run.dataset != first.dataset:
            yield f"{run.label} was asked other questions than {first.label} (another checksum): no test of difference."
        changed = [
            name
            for name in {**first.report["provenance"], **run.report["provenance"]}
            if name not in ("sessions", "model", "dataset_sha256", "judge")
            and first.report["provenance"].get(name) != run.report["provenance"].get(name)
        ]
        if changed:
            yield f"{run.label} differs from {first.label} also in: {', '.join(changed)}."
    for place, run in enumerate(runs):
        if run.report["num_errors"]:
            yield f"{run.label}: questions without an answer, which count as wrong: {run.report['num_errors']}."
        found = [row.differences[place] for row in rows]
        unmatched = max((each.unmatched for each in found if each is not None), default=0)
        if unmatched:
            yield f"{run.label}: up to {unmatched} groups are scored in one of both runs only, and left out of tests."
    if len(runs) > 1:
        yield (
            "Differences are paired (same questions), to the first run; their p values are for one comparison each and "
            "not corrected for their number."
        )


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-length:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"the same run is named twice: {', '.join(map(str, folders))}.")


def _runs_in(folder: Path) -> list[Path]:
    if (folder / RUN_FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}")) if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder} is not the folder of an evaluation: neither it nor a folder in it has a {RUN_FILE}.")
    return found


def _read_run(folder: Path, label: str) -> FinishedRun:
    path = folder / REPORT_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds a run that is not finished (no {REPORT_FILE}). Run it again: it resumes.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        scores = [Score(**{name: entry[name] for name in SCORE_COLUMNS}) for entry in report.pop("scores")]
        for name in ("benchmark", "title", "data", "num_errors", "provenance"):
            report[name]
        report["provenance"]["dataset_sha256"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Run the evaluation again: it only scores again.") from error
    return FinishedRun(label, folder, report, {name_of(score): score for score in scores}, read_samples(folder))
