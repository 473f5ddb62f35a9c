"""What an evaluation found: as JSON, CSV and Markdown, and as tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.evaluation.benchmarks import Benchmark
from llava_npu.evaluation.predictions import Prediction
from llava_npu.evaluation.questions import Dataset
from llava_npu.evaluation.reports.samples import write_samples
from llava_npu.evaluation.statistics.accuracy import LEVELS, OVERALL, SCORE_COLUMNS, Score, group_questions
from llava_npu.evaluation.statistics.bootstrap import interval_text
from llava_npu.files.atomic import write_text
from llava_npu.files.tables import TextTable
from llava_npu.files.untrusted import csv_text, markdown_code, markdown_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_MAX_LISTED = 20  # unreadable images named in the notes
_MAX_SHOWN = 4  # columns of scores that a terminal of 80 characters can hold
_MOST_COLUMNS = 6  # … and a table of a Markdown page
_MAX_DIFFERENCES = 100  # rows of them that are printed
_MAX_CELL = 120  # characters of an answer that are printed


@dataclass(frozen=True)
class Difference:
    """A question that the extraction rules read differently."""

    id: str
    truth: str | None
    answer: str
    parsed: dict[str, str | None]


@dataclass(frozen=True)
class Report:
    """Scores and everything needed to judge them.

    Attributes:
        benchmark, title: which one.
        data: the file's path.
        num_questions, num_groups: how many rows, and how many units they form.
        num_errors: questions without an answer (unreadable images), counted as wrong.
        seconds: spent on answering, all sessions together.
        scores: every metric × extraction rule × split × category.
        notes: what a reader should know.
        differences: where the extraction rules disagree.
        provenance: benchmark, data checksum, model fingerprint, settings, judge, the sessions' commands and versions.
        rules: extraction rule → what it is.
    """

    benchmark: str
    title: str
    data: str
    num_questions: int
    num_groups: int
    num_errors: int
    seconds: float
    scores: tuple[Score, ...]
    notes: tuple[str, ...]
    differences: tuple[Difference, ...]
    provenance: dict[str, Any]
    rules: dict[str, str] = field(default_factory=dict)

    def overall(self, metric: str, extraction: str = "strict", split: str | None = None) -> Score:
        """The overall score of a metric; `split` may be left out if there is only one."""
        found = [
            score
            for score in self.scores
            if score.level == OVERALL
            and (score.metric, score.extraction) == (metric, extraction)
            and split in (None, score.split)
        ]
        if len(found) != 1:
            have = sorted({(score.metric, score.extraction, score.split) for score in self.scores})
            raise KeyError(f"{len(found)} overall scores for {(metric, extraction, split)}; there are {have}")
        return found[0]


def build_report(
    benchmark: Benchmark,
    dataset: Dataset,
    predictions: Sequence[Prediction],
    notes: Iterable[str],
    provenance: dict[str, Any],
) -> Report:
    """Scores predictions of a dataset, whose questions are as they were asked."""
    questions = dataset.questions
    parsed = {prediction.id: prediction.parsed for prediction in predictions}
    return Report(
        benchmark=benchmark.name,
        title=benchmark.title,
        data=str(dataset.path),
        num_questions=len(questions),
        num_groups=len(group_questions(questions)),
        num_errors=sum(prediction.error is not None for prediction in predictions),
        seconds=round(sum(prediction.seconds for prediction in predictions), 3),
        scores=tuple(benchmark.score(questions, parsed)),
        notes=(*notes, *benchmark.review(questions, parsed), *_error_notes(predictions)),
        differences=tuple(
            Difference(prediction.id, prediction.truth, prediction.answer, prediction.parsed)
            for prediction in sorted(predictions, key=lambda prediction: prediction.id)
            if len(set(prediction.parsed.values())) > 1
        ),
        provenance=provenance,
        rules=dict(benchmark.rules),
    )


def _error_notes(predictions: Sequence[Prediction]) -> list[str]:
    errors: dict[str, list[str]] = {}
    for prediction in sorted(predictions, key=lambda each: each.id):
        if prediction.error is not None:
            errors.setdefault(prediction.error, []).append(prediction.id)
    if not errors:
        return []
    shown = [f"{_some(ids)}: {error}" for error, ids in list(errors.items())[:_MAX_LISTED]]
    if len(errors) > _MAX_LISTED:
        shown.append(f"and {len(errors) - _MAX_LISTED} other reasons, see predictions.jsonl")
    count = sum(map(len, errors.values()))
    return [f"{count} questions could not be answered and count as wrong: " + "; ".join(shown)]


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_MAX_LISTED]) + (f" and {len(ids) - _MAX_LISTED} more" if len(ids) > _MAX_LISTED else "")


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json, report.md, scores.csv, differences.csv and samples.json, each atomically."""
    facts = {**asdict(replace(report, scores=())), "scores": [score.facts() for score in report.scores]}
    write_text(folder / "report.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_samples(report.scores, folder)
    write_text(folder / "report.md", as_markdown(report))
    write_text(folder / "scores.csv", scores_as_csv(report))
    write_text(folder / "differences.csv", differences_as_csv(report))


def scores_as_csv(report: Report) -> str:
    """One line a score."""
    return csv_text(SCORE_COLUMNS, (score.facts().values() for score in report.scores))


def differences_as_csv(report: Report) -> str:
    """One line for each question that the extraction rules read differently."""
    rules = _extractions(report)
    return csv_text(
        ("id", "truth", *rules, "answer"),
        ((row.id, row.truth, *(row.parsed.get(rule) for rule in rules), row.answer) for row in report.differences),
    )


def as_markdown(report: Report) -> str:
    """The report as a page."""
    lines = [f"# {markdown_text(report.title)}", ""]
    for split in _splits(report):
        if split:
            lines += [f"## Split {markdown_text(split)}", ""]
        measures = _measures(_of_split(report, split))
        while measures:
            fitting = _fitting(measures, _MOST_COLUMNS)
            columns, rows = _columns_and_rows(report, split, measures[:fitting])
            labelled = [[name if level == OVERALL else f"{level}: {name}", *cells] for level, name, *cells in rows]
            lines.append(TextTable(columns, labelled).as_markdown())
            measures = measures[fitting:]
    lines += [*_explanation(report), ""]
    if report.notes:
        lines += ["## Notes", "", *(f"- {markdown_text(note)}" for note in report.notes), ""]
    lines += [
        "## Origin",
        "",
        *(f"- {markdown_text(name)}: {markdown_code(str(value))}" for name, value in _origin(report)),
        "",
    ]
    return "\n".join(lines)


def _explanation(report: Report) -> list[str]:
    rules = [rule for rule in report.rules if any(score.extraction == rule for score in report.scores)]
    lines = ["In percent, with the 95 % interval (bootstrap over groups)."]
    if len(rules) > 1:
        lines[0] += (
            f" Each answer is read by {len(rules)} rules; they disagree on {len(report.differences)} of "
            f"{report.num_questions} answers (differences.csv):"
        )
    return [*lines, "", *(f"- *{rule}*: {report.rules[rule]}" for rule in rules)]


def as_terminal(report: Report) -> RenderableType:
    """The report for a rich console."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for split in _splits(report):
        measures = _measures(_of_split(report, split))
        fitting = _fitting(measures, _MAX_SHOWN)
        columns, rows = _columns_and_rows(report, split, measures[:fitting])
        title = f"{report.title}, split {split}" if split else report.title
        levels = [level for level, *_ in rows]
        table = TextTable(
            [column.replace(", ", "\n") for column in columns],
            [[name, *(cell.replace(" ", "\n") for cell in cells)] for _, name, *cells in rows],
        )
        sections = {levels.index(level): f"by {level}" for level in dict.fromkeys(levels) if level != OVERALL}
        parts.append(table.as_terminal(title, sections, caption="percent and its 95 % interval"))
        parts += [Text(line) for line in _overall_lines(_of_split(report, split), measures[fitting:])]
    parts += [Text(f"! {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def differences_for_terminal(report: Report) -> RenderableType:
    """The questions that the extraction rules read differently, row by row, for a rich console."""
    from rich.text import Text

    if not report.differences:
        return Text(f"{report.title}: all rules read every answer alike.")
    rules = list(dict.fromkeys(rule for row in report.differences for rule in row.parsed))
    shown = report.differences[:_MAX_DIFFERENCES]
    title = f"{report.title}: {len(report.differences)} of {report.num_questions} answers are read differently"
    more = f"the first {len(shown)}; all are in differences.csv" if len(shown) < len(report.differences) else None
    columns = ["question", "right", *rules, "answer"]
    rows = [(row.id, row.truth or "", *(row.parsed.get(rule) or "—" for rule in rules), row.answer) for row in shown]
    table = TextTable(columns, [list(map(_clipped, row)) for row in rows], num_names=len(columns))
    return table.as_terminal(title, caption=more)


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CELL else f"{line[: _MAX_CELL - 1]}…"


def _splits(report: Report) -> list[str]:
    return sorted({score.split for score in report.scores})


def _extractions(report: Report) -> list[str]:
    return sorted({rule for row in report.differences for rule in row.parsed} | {s.extraction for s in report.scores})


def _columns_and_rows(
    report: Report, split: str, columns: Sequence[tuple[str, str]]
) -> tuple[list[str], list[list[str]]]:
    """One row for overall and each category, one column for each of these metrics and extraction rules.

    Returns:
        the headers of the columns behind the first, and rows of level, name and cells.
    """
    scores = [score for score in _of_split(report, split) if (score.metric, score.extraction) in columns]
    cells = {(score.level, score.name, score.metric, score.extraction): score for score in scores}
    names = sorted({(score.level, score.name) for score in scores}, key=lambda row: (LEVELS.index(row[0]), row[1]))
    rows = []
    for level, name in names:
        # A category may lack a metric (no unrotated question, say).
        row = [cells.get((level, name, *measure)) for measure in columns]
        rows.append([level, name, *map(percent, row), str(max((score.count for score in row if score), default=0))])
    return ["", *(f"{metric}, {extraction}" for metric, extraction in columns), "n"], rows


def scores_by_rule(report: Report, levels: Sequence[str]) -> TextTable:
    """The scores of these levels: a row for each metric of each part, a column for each extraction rule."""
    scores = {
        (score.split, score.level, score.name, score.metric, score.extraction): score
        for score in report.scores
        if score.level in levels
    }
    rules = list(dict.fromkeys(key[-1] for key in scores))
    parts = sorted(
        dict.fromkeys(key[:-1] for key in scores), key=lambda part: (part[0], LEVELS.index(part[1]), part[2])
    )
    rows = []
    for split, level, name, metric in parts:
        cells = [scores.get((split, level, name, metric, rule)) for rule in rules]
        title = ", ".join(part for part in (split, name if level != OVERALL else "", metric) if part)
        rows.append([title, *map(percent, cells), str(max(cell.count for cell in cells if cell))])
    return TextTable(["", *rules, "n"], rows)


def _of_split(report: Report, split: str) -> list[Score]:
    return [score for score in report.scores if score.split == split]


def _measures(scores: Sequence[Score]) -> list[tuple[str, str]]:
    """Metrics and extraction rules, the rules of one metric side by side."""
    metrics = list(dict.fromkeys(score.metric for score in scores))
    measures = dict.fromkeys((score.metric, score.extraction) for score in scores)
    return sorted(measures, key=lambda measure: metrics.index(measure[0]))


def _fitting(measures: Sequence[tuple[str, str]], most: int) -> int:
    """How many columns to show so that they fit and, if possible, are whole metrics."""
    ends = [place for place in range(1, len(measures) + 1) if measures[place - 1][0] not in dict(measures[place:])]
    return max((end for end in ends if end <= most), default=most)


def _overall_lines(scores: Sequence[Score], measures: Iterable[tuple[str, str]]) -> list[str]:
    """The overall scores of these metrics and rules, a line for each metric."""
    overall = {(score.metric, score.extraction): score for score in scores if score.level == OVERALL}
    lines: dict[str, list[str]] = {}
    for metric, rule in measures:
        if (metric, rule) in overall:
            lines.setdefault(metric, []).append(f"{rule} {percent(overall[metric, rule])}")
    return [f"  {metric}: {', '.join(of_metric)}" for metric, of_metric in lines.items()]


def score_title(metric: str, extraction: str, split: str, name: str = OVERALL) -> str:
    """What a score is called where it stands alone."""
    where = [part for part in (split, name if name != OVERALL else "") if part]
    return ", ".join([*where, metric, extraction])


def percent(score: Score | None) -> str:
    """A score and its interval; "" for none."""
    return "" if score is None else interval_text(score)


def _origin(report: Report) -> list[tuple[str, Any]]:
    sessions = report.provenance.get("sessions", [])
    told = {name: value for name, value in report.provenance.items() if name != "sessions" and value is not None}
    facts = [("data", report.data), *told.items()]
    facts += [("questions", f"{report.num_questions} in {report.num_groups} groups"), ("seconds", report.seconds)]
    for session in sessions[-1:]:
        facts += [("command", session["command"]), ("device", session["device"])]
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in session["versions"].items())))
    return facts
