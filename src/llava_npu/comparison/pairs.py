"""Which models differ? All trials answered the same questions, so their differences are tested pair by pair.

An interval of one model's score holds how easy the questions happened to be, which all models share; in a paired
difference that is gone. The tests are those of `llava-npu report` (evaluation/statistics/significance.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_npu.comparison.folder import EVALUATION, HELD_OUT
from llava_npu.comparison.results import BenchmarkResult, metric_label
from llava_npu.comparison.table import HELD_OUT_LOSS, Baseline, TrialRow
from llava_npu.evaluation.reports.comparison import REPORT_FILE, read_runs
from llava_npu.evaluation.reports.samples import SAMPLES_FILE, ScoreName, read_samples
from llava_npu.evaluation.statistics.accuracy import ScoreSample
from llava_npu.evaluation.statistics.significance import PairedDifference, paired_differences

Pair = tuple[int, int]  # places of two lines: of what is compared, and with what


@dataclass(frozen=True)
class MeasuredSample:
    """What a value of a line was computed from, and of which data: only equal `data` can be paired."""

    data: tuple[str, ScoreName]
    sample: ScoreSample


def references(lines: Sequence[TrialRow]) -> list[int | None]:
    """What each line is compared with: the first finished one of its encoder and of what varies.

    Those firsts are compared with the very first; it, and lines without a result, with nothing.
    """
    first: dict[str, int] = {}
    found: list[int | None] = []
    for place, line in enumerate(lines):
        if line.result is None:
            found.append(None)
            continue
        own = first.setdefault(repr((line.encoder, sorted(line.varied.items()))), place)
        very_first = next(iter(first.values()))
        found.append(own if own != place else very_first if very_first != place else None)
    return found


def against_references(lines: Sequence[TrialRow]) -> list[Baseline | None]:
    """Each line against its reference; None where it has none."""
    to = references(lines)
    pairs = [(place, other) for place, other in enumerate(to) if other is not None]
    tested = differences(lines, pairs)
    return [
        None if other is None else Baseline(lines[other].name, tested[place, other]) for place, other in enumerate(to)
    ]


def differences(lines: Sequence[TrialRow], pairs: Sequence[Pair]) -> dict[Pair, dict[str, PairedDifference]]:
    """Tests pairs of lines.

    Returns:
        pair → measure → the first line's value minus the second's. A measure is missing where the two were not put to
        the same questions, or their answers have been deleted.

    Raises:
        UserError: files of an evaluation are damaged.
    """
    found_of = {place: measured(lines[place]) for place in sorted({place for pair in pairs for place in pair})}
    of_data: dict[tuple[str, tuple[str, ScoreName]], list[int]] = defaultdict(list)
    for place, by_measure in found_of.items():
        for measure, each in by_measure.items():
            of_data[measure, each.data].append(place)
    found: dict[Pair, dict[str, PairedDifference]] = {pair: {} for pair in pairs}
    for (measure, _), places in of_data.items():
        rank = {place: number for number, place in enumerate(places)}
        wanted = [(of, to) for of, to in pairs if of in rank and to in rank]
        samples = [found_of[place][measure].sample for place in places]
        tested = paired_differences(samples, [(rank[to], rank[of]) for of, to in wanted])
        for pair, difference in zip(wanted, tested, strict=True):
            if difference is not None:
                found[pair][measure] = difference
    return found


def measured(line: TrialRow) -> dict[str, MeasuredSample]:
    """What a line's values were computed from, by measure; those whose files are gone are missing."""
    if line.result is None:
        return {}
    found = {}
    for benchmark in line.result.benchmarks:
        each = _of_benchmark(_evaluation(line, benchmark), benchmark)
        if each is not None:
            found[benchmark.label] = each
    held_out = line.folder / HELD_OUT if line.folder else None
    if held_out is not None and (held_out / SAMPLES_FILE).is_file():
        ((name, sample),) = read_samples(held_out).items()
        found[HELD_OUT_LOSS] = MeasuredSample((name.split, name), sample)
    return found


def _evaluation(line: TrialRow, benchmark: BenchmarkResult) -> Path:
    """Where the benchmark's answers are: in the trial's folder, wherever that was moved to."""
    if line.folder is not None and (inside := line.folder / EVALUATION / Path(benchmark.folder).name).is_dir():
        return inside
    return Path(benchmark.folder)


def _of_benchmark(folder: Path, benchmark: BenchmarkResult) -> MeasuredSample | None:
    if not benchmark.folder or not (folder / REPORT_FILE).is_file() or not (folder / SAMPLES_FILE).is_file():
        return None
    (run,) = read_runs([folder])
    for name, sample in run.samples.items():
        if metric_label(name) == benchmark.metric:
            return MeasuredSample((run.dataset, name), sample)
    return None
