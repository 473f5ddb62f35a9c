"""A comparison of runs: for the terminal, as Markdown, CSV, JSON, and as a page of all questions and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llava_npu.errors import UserError
from llava_npu.evaluation.ablations import with_images
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.judge.judging import with_judgements
from llava_npu.evaluation.predictions import read_predictions
from llava_npu.evaluation.reports.comparison import ComparedScore, FinishedRun, RunComparison
from llava_npu.evaluation.reports.page import PageRun, QuestionsPage, write_page
from llava_npu.evaluation.reports.report import percent, score_title
from llava_npu.evaluation.run_folder import PREDICTIONS_FILE
from llava_npu.evaluation.statistics.accuracy import L2_CATEGORY, OVERALL
from llava_npu.evaluation.statistics.bootstrap import difference_text
from llava_npu.evaluation.statistics.significance import PairedDifference, p_text
from llava_npu.files.atomic import write_text
from llava_npu.files.tables import TextTable
from llava_npu.files.untrusted import csv_text, markdown_code, markdown_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_CAPTION = "percent with its 95 % interval"
_PAIRED = "below it the difference to the first run, its interval, and p of the paired bootstrap [McNemar's exact test]"


def write_comparison(comparison: RunComparison, folder: Path, data: Path | None = None) -> list[str]:
    """Writes comparison.md, comparison.csv, comparison.json and comparison.html, each atomically.

    Args:
        comparison: of one benchmark.
        folder: where to.
        data: the benchmark's data, if it is not where the first run found it.

    Returns:
        notes on what could not be written.
    """
    notes = write_comparison_page(comparison, folder / "comparison.html", data)
    write_text(folder / "comparison.md", as_markdown(comparison))
    write_text(folder / "comparison.csv", as_csv(comparison))
    write_text(folder / "comparison.json", as_json(comparison))
    return notes


def write_comparison_page(comparison: RunComparison, path: Path, data: Path | None = None) -> list[str]:
    """Writes the page of all questions with every run's answers. It needs the benchmark's data."""
    benchmark, first = get(comparison.benchmark), comparison.runs[0]
    try:
        dataset = read_dataset(benchmark, data or Path(str(first.report["data"])))
    except UserError as error:
        return [f"No {path.name}: {error} Give its place with --data."]
    if dataset.sha256 != first.dataset:
        return [f"No {path.name}: {dataset.path} is not the file that {first.label} was asked (another checksum)."]
    questions, _ = with_images(dataset.questions, str(first.report["provenance"]["images"]))
    page = QuestionsPage(
        title=f"{comparison.title}: {' · '.join(run.label for run in comparison.runs)}",
        notes=comparison.notes,
        scores={
            "": _wide_table(_of_level(comparison, OVERALL), comparison.runs),
            "by l2-category": _wide_table(_of_level(comparison, L2_CATEGORY), comparison.runs),
        },
        benchmark=benchmark,
        questions=questions,
        runs=[_page_run(run) for run in comparison.runs if run.dataset == first.dataset],
    )
    write_page(path, page)
    return []


def as_terminal(comparison: RunComparison) -> RenderableType:
    """The comparison's overall scores for a rich console."""
    from rich.console import Group
    from rich.text import Text

    notes = [Text(f"! {note}", style="yellow") for note in comparison.notes]
    table = _table(_of_level(comparison, OVERALL), comparison.runs)
    if not table.rows:
        return Group(Text(f"{comparison.title}: no scores (of {', '.join(table.columns[1:])})."), *notes)
    shown = table.as_terminal(comparison.title, caption=Text(_caption(comparison)), show_lines=True)
    return Group(shown, *notes)


def as_markdown(comparison: RunComparison) -> str:
    """The comparison as a page."""
    table = _table(comparison.rows, comparison.runs)
    lines = [
        f"# {markdown_text(comparison.title)}",
        "",
        table.as_markdown(),
        f"In {_caption(comparison)}.",
        "",
        "## Runs",
        "",
    ]
    for run in comparison.runs:
        folder, model = markdown_code(str(run.folder)), markdown_code(str(run.report["provenance"]["model"]))
        lines.append(f"- {markdown_text(run.label)}: {folder}, model {model}")
    lines += ["", "## Notes", "", *(f"- {markdown_text(note)}" for note in comparison.notes), ""]
    return "\n".join(lines)


def as_csv(comparison: RunComparison) -> str:
    """One line for each score of each run."""
    names = ("split", "level", "name", "metric", "extraction")
    differences = ("difference", "difference_low", "difference_high", "p", "mcnemar_p", "only_first", "only_this")
    rows = []
    for row in comparison.rows:
        for run, score, difference in zip(comparison.runs, row.scores, row.differences, strict=True):
            if score is not None:
                facts = [getattr(row.name, name) for name in names]
                values = [score.value, score.low, score.high, score.count]
                rows.append([run.label, *facts, *values, *_difference_facts(difference)])
    return csv_text(["run", *names, "value", "low", "high", "count", *differences], rows)


def as_json(comparison: RunComparison) -> str:
    """All of it, each run with what its report says of its origin."""
    facts = {
        "benchmark": comparison.benchmark,
        "runs": [
            {"label": run.label, "folder": str(run.folder), "provenance": run.report["provenance"]}
            for run in comparison.runs
        ],
        "scores": [
            {
                **asdict(row.name),
                "runs": [score and score.facts() for score in row.scores],
                "differences": [difference and asdict(difference) for difference in row.differences],
            }
            for row in comparison.rows
        ],
        "notes": comparison.notes,
    }
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def _table(rows: Sequence[ComparedScore], runs: Sequence[FinishedRun]) -> TextTable:
    """A row for each score: its name, and each run's value with the difference to the first below it."""
    cells = [
        [
            score_title(row.name.metric, row.name.extraction, row.name.split, row.name.name),
            *("\n".join(_cell(row, place)) for place in range(len(runs))),
        ]
        for row in rows
    ]
    return TextTable(["", *(run.label for run in runs)], cells)


def _caption(comparison: RunComparison) -> str:
    return f"{_CAPTION}; {_PAIRED}" if len(comparison.runs) > 1 else _CAPTION


def _of_level(comparison: RunComparison, level: str) -> list[ComparedScore]:
    return [row for row in comparison.rows if row.name.level == level]


def _wide_table(rows: Sequence[ComparedScore], runs: Sequence[FinishedRun]) -> TextTable:
    """As `_table`, with columns of their own for differences."""
    columns = ["", runs[0].label]
    for run in runs[1:]:
        columns += [run.label, "difference", "p [McNemar]"]
    cells = []
    for row in rows:
        title = score_title(row.name.metric, row.name.extraction, row.name.split, row.name.name)
        line = [title, percent(row.scores[0])]
        for score, difference in zip(row.scores[1:], row.differences[1:], strict=True):
            tested = ("", "") if difference is None else (difference_text(difference), _p_values(difference))
            line += [percent(score), *tested]
        cells.append(line)
    return TextTable(columns, cells)


def _cell(row: ComparedScore, place: int) -> Iterator[str]:
    yield percent(row.scores[place])
    difference = row.differences[place]
    if difference is not None:
        yield difference_text(difference)
        yield f"p {_p_values(difference)}"


def _p_values(difference: PairedDifference) -> str:
    return p_text(difference.p) + (f" [{p_text(difference.mcnemar.p)}]" if difference.mcnemar else "")


def _difference_facts(difference: PairedDifference | None) -> list[float | int | None]:
    if difference is None:
        return [None] * 7
    test = difference.mcnemar
    counts = [None, None, None] if test is None else [test.p, test.only_first, test.only_second]
    return [difference.value, difference.low, difference.high, difference.p, *counts]


def _page_run(run: FinishedRun) -> PageRun:
    predictions, _ = read_predictions(run.folder / PREDICTIONS_FILE)
    rule = get(run.benchmark).judging
    judged = with_judgements(rule, predictions, run.folder) if rule else predictions
    return PageRun(run.label, {prediction.id: prediction for prediction in judged})
