"""What a comparison found, on disk: tables for people and programs, the plot, and a page that needs nothing else.

comparison.md, comparison.csv, comparison.json    the table
comparison.tex                                    with several seeds: mean and deviation as a LaTeX table
pareto.png, pareto.svg                            the first measure against what the models cost
radar.png, radar.svg                              with three or more benchmarks: all of them at once
index.html                                        all of it, with images and every model's answers
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llava_npu.comparison import pairs, pareto, radar, seeds, table
from llava_npu.comparison.examples import ExampleQuestion
from llava_npu.comparison.results import Result
from llava_npu.comparison.table import HELD_OUT_LOSS, Baseline, TrialRow
from llava_npu.evaluation.statistics.bootstrap import signed
from llava_npu.evaluation.statistics.significance import PairedDifference
from llava_npu.files.atomic import write_bytes, write_text
from llava_npu.files.pages import render_page
from llava_npu.files.untrusted import markdown_code, markdown_text
from llava_npu.version import __version__

PAGE = "index.html"
FEWEST = "fewest visual tokens"
PAIRED = (
    "The model's value minus that of the one it is compared with, on the same questions: 95 % interval and two-sided p "
    "of the paired bootstrap. Each p is for one comparison and not corrected for their number."
)
_PAIRED_ON_PAGE = 40  # models; of more, the page holds each one's difference to its reference alone


@dataclass(frozen=True)
class ComparisonReport:
    """Everything that a report shows.

    Attributes:
        title: of the page.
        note: what readers must know of data and scale; "" if there is nothing.
        lines: the trials, in the grid's order.
        examples: images of the first benchmark.
        configuration: of the comparison, as YAML; "" where it is made of single runs.
        command: that made it.
        correction: of p values over seeds, see `significance.corrected`.
    """

    title: str
    note: str
    lines: Sequence[TrialRow]
    examples: Sequence[ExampleQuestion]
    configuration: str
    command: str
    correction: str = "none"

    @cached_property
    def seeded(self) -> seeds.SeededTable | None:
        """Models over their seeds; None where each has one."""
        return seeds.seeded_table(self.lines, self.correction)

    @property
    def results(self) -> list[Result]:
        return [line.result for line in self.lines if line.result is not None]


@dataclass(frozen=True)
class Highlight:
    """A number that the page shows large."""

    what: str
    number: str
    who: str


def write_report(comparison: ComparisonReport, output: Path) -> Path:
    """Writes all files, each atomically; returns the page."""
    against = pairs.against_references(comparison.lines)
    write_text(output / "comparison.csv", table.as_csv(comparison.lines, against))
    write_text(output / "comparison.md", as_markdown(comparison, against))
    described = as_json(comparison, against)
    write_text(output / "comparison.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    if comparison.seeded is not None:
        write_text(output / "comparison.tex", seeds.as_latex(comparison.seeded, _caption(comparison)))
    figures = [pareto.draw(comparison.results, measure) for measure in pareto.measures(comparison.results)]
    plots = [pareto.as_svg(figure) for figure in figures]
    if figures:
        write_text(output / "pareto.svg", plots[0])
        write_bytes(output / "pareto.png", pareto.as_png(figures[0]))
    at_once = radar.choose(comparison.results)
    radar_plot = None
    if at_once is not None:
        figure = radar.draw(at_once, comparison.results)
        radar_plot = pareto.as_svg(figure)
        write_text(output / "radar.svg", radar_plot)
        write_bytes(output / "radar.png", pareto.as_png(figure))
    shown = {"plots": plots, "radar": at_once, "radar_plot": radar_plot}
    write_text(output / PAGE, _render(comparison, shown))
    return output / PAGE


def as_markdown(comparison: ComparisonReport, against: Sequence[Baseline | None]) -> str:
    """The tables with what they mean and how they were made."""
    shown = table.columns(comparison.results)
    titles = [f"{column.title}, {column.unit}" if column.unit else column.title for column in shown]
    notes = [f"- *{markdown_text(title)}*: {column.about}." for title, column in zip(titles, shown, strict=True)]
    parts = [
        f"# {markdown_text(comparison.title)}",
        markdown_text(comparison.note),
        table.as_markdown(comparison.lines),
        "\n".join(notes),
    ]
    if comparison.seeded is not None:
        parts += ["## Over seeds", comparison.seeded.about, seeds.as_markdown(comparison.seeded)]
    if differences := table.differences_as_markdown(comparison.lines, against):
        parts += ["## Pair by pair", PAIRED, differences]
    parts.append(markdown_text(_made_with(comparison)))
    if comparison.command:
        parts.append(f"Command: {markdown_code(comparison.command)}")
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def as_json(comparison: ComparisonReport, against: Sequence[Baseline | None]) -> dict[str, Any]:
    """Everything but images."""
    best = {
        measure.title: {
            axis.title: [each.name for each in pareto.frontier(comparison.results, measure, axis.cost)]
            for axis in pareto.AXES
        }
        for measure in pareto.measures(comparison.results)
    }
    return {
        "title": comparison.title,
        "note": comparison.note,
        "version": __version__,
        "command": comparison.command,
        "configuration": yaml.safe_load(comparison.configuration) if comparison.configuration else None,
        "not_beaten": best,
        "over_seeds": comparison.seeded.as_json() if comparison.seeded else None,
        "trials": [
            {
                "name": line.name,
                "encoder": line.encoder,
                "projector": line.projector,
                "varied": dict(line.varied),
                "outcome": "finished" if line.result else table.outcome(line),
                "result": line.result.as_json() if line.result else None,
                "compared": asdict(other) if other else None,
            }
            for line, other in zip(comparison.lines, against, strict=True)
        ],
        "examples": [{**asdict(example), "image": None} for example in comparison.examples],
    }


def highlights(results: Sequence[Result]) -> list[Highlight]:
    """The best by the first two measures, the cheapest of those that are not beaten, and the quickest."""
    found = []
    for measure in pareto.measures(results)[:2]:
        unbeaten = pareto.frontier(results, measure, pareto.AXES[0].cost)
        if unbeaten:
            found.append(Highlight(f"best on {measure.title}", _number(unbeaten[-1], measure), _who(unbeaten[-1])))
        if len(unbeaten) > 1 and not any(each.what == FEWEST for each in found):
            fewest = unbeaten[0]
            score = f"{fewest.name}, {_number(fewest, measure)} on {measure.title}"
            found.append(Highlight(FEWEST, str(fewest.visual_tokens), score))
    quick = min((r for r in results if r.first_token), key=lambda r: r.first_token.value, default=None)  # type: ignore[union-attr]
    if quick is not None and quick.first_token is not None:
        found.append(Highlight("quickest first token", f"{quick.first_token.value:.0f} ms", _who(quick)))
    return found


def _number(result: Result, measure: pareto.Measure) -> str:
    value = measure.value(result)
    assert value is not None
    return f"{100 * value.value:.1f} %" if measure.unit == "%" else f"{value.value:.2f}"


def _caption(comparison: ComparisonReport) -> str:
    """States models, data, seeds and protocol, as far as the results hold them."""
    assert comparison.seeded is not None
    result = comparison.results[0]
    counts = sorted({len(model.lines) for model in comparison.seeded.models})
    scores = "; ".join(f"{each.label}: {each.metric}, {each.score.count:,} questions" for each in result.benchmarks)
    stages = ", ".join(f"{name} ({stage.steps:,} steps)" for name, stage in result.stages.items())
    return " ".join(
        part
        for part in (
            f"{comparison.title}. Mean and standard deviation over {' to '.join(map(str, counts))} seeds.",
            f"Trained: {stages}, {result.dtype}.",
            f"{scores}." if scores else "",
            comparison.note,
        )
        if part
    )


def _who(result: Result) -> str:
    return f"{result.name}, {result.visual_tokens} tokens"


def _made_with(comparison: ComparisonReport) -> str:
    devices = ", ".join(dict.fromkeys(f"{result.device} ({result.dtype})" for result in comparison.results))
    return f"Made with llava-npu {__version__}" + (f" on {devices}." if devices else ".")


def _render(comparison: ComparisonReport, shown: Mapping[str, Any]) -> str:
    results = comparison.results
    return render_page(
        Path(__file__).parent,
        "page.html",
        title=comparison.title,
        comparison=comparison,
        results=results,
        columns=table.columns(results),
        varied=table.varied_keys(comparison.lines),
        several_encoders=len({result.encoder for result in results}) > 1,
        seeded=comparison.seeded,
        seeded_rows=seeds.page_rows(comparison.seeded) if comparison.seeded else [],
        others=[(line, table.outcome(line)) for line in comparison.lines if line.result is None],
        colours=pareto.colours(results),
        unbeaten={
            result.name
            for measure in pareto.measures(results)[:1]
            for axis in pareto.AXES
            for result in pareto.frontier(results, measure, axis.cost)
        },
        labels=[_label_within_projector(result, results) for result in results],
        highlights=highlights(results),
        matrices=_matrices(results),
        **shown,
        paired=_paired(comparison.lines),
        paired_about=PAIRED,
        intervals={label: _scale(results, label) for label in table.labels(results)},
        made_with=_made_with(comparison),
        today=f"{datetime.now(UTC):%Y-%m-%d}",
    )


def _label_within_projector(result: Result, results: Sequence[Result]) -> str:
    """What tells a model from others with the same projector."""
    encoder = [result.encoder] if len({each.encoder for each in results}) > 1 else []
    return " · ".join([*encoder, *(f"{key}={value}" for key, value in result.varied.items())])


def _matrices(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The first two measures as a map of projectors by encoders; nothing where the grid has another shape."""
    encoders = list(dict.fromkeys(result.encoder for result in results))
    projectors = list(dict.fromkeys(result.projector for result in results))
    place = {(result.projector, result.encoder): number for number, result in enumerate(results)}
    if len(encoders) < 2 or len(projectors) < 2 or len(place) < len(results):
        return []
    return [_matrix(results, measure, projectors, encoders, place) for measure in pareto.measures(results)[:2]]


def _matrix(
    results: Sequence[Result],
    measure: pareto.Measure,
    projectors: Sequence[str],
    encoders: Sequence[str],
    place: dict[tuple[str, str], int],
) -> dict[str, Any]:
    known = [value.value for result in results if (value := measure.value(result)) is not None]
    low, high = min(known), max(known)
    digits = 1 if measure.unit == "%" else 2

    def cell(projector: str, encoder: str) -> dict[str, Any] | None:
        number = place.get((projector, encoder))
        value = None if number is None else measure.value(results[number])
        if value is None:
            return None
        height = (value.value - low) / max(high - low, 1e-9)
        ends = (f"{measure.scale * end:.{digits}f}" for end in (value.low, value.high))
        return {
            "place": number,
            "text": f"{measure.scale * value.value:.{digits}f}",
            "interval": "–".join(ends),
            "shade": round(6 + 54 * (height if measure.higher_is_better else 1 - height)),
        }

    return {
        "title": measure.title,
        "unit": measure.unit,
        "less": not measure.higher_is_better,
        "encoders": encoders,
        "rows": [{"projector": name, "cells": [cell(name, encoder) for encoder in encoders]} for name in projectors],
    }


def _paired(lines: Sequence[TrialRow]) -> dict[str, Any]:
    """Differences as the page's script reads them; models are numbered by their place among the finished ones.

    Returns:
        "references" (of each model, or null), "complete" (whether every pair is there), and "measures": title, unit,
        whether less is better, and the differences, as in "3-0" (model 3 minus model 0): [value, low, high, p, and the
        first three as text].
    """
    done = [line for line in lines if line.result is not None]
    of = pairs.references(done)
    wanted = [(place, other) for place, other in enumerate(of) if other is not None]
    complete = len(done) <= _PAIRED_ON_PAGE
    if complete:
        wanted = list(dict.fromkeys([*wanted, *itertools.permutations(range(len(done)), 2)]))
    tested = pairs.differences(done, wanted)
    measures = []
    for title in dict.fromkeys(measure for by_measure in tested.values() for measure in by_measure):
        loss = title == HELD_OUT_LOSS
        scale, digits = table.scale_and_digits(title)
        numbers = {
            f"{pair[0]}-{pair[1]}": _numbers(each, scale, digits)
            for pair, by_measure in tested.items()
            if (each := by_measure.get(title)) is not None
        }
        unit = "nats per token" if loss else "percentage points"
        measures.append({"title": title, "unit": unit, "less": loss, "pairs": numbers})
    return {"references": of, "complete": complete, "measures": measures}


def _numbers(difference: PairedDifference, scale: float, digits: int) -> list[float | str]:
    scaled = [scale * number for number in (difference.value, difference.low, difference.high)]
    return [*scaled, difference.p, *(signed(number, digits) for number in scaled)]


def _scale(results: Sequence[Result], label: str) -> tuple[float, float]:
    """The least and greatest end of an interval on a benchmark: where the page's small interval bars begin and end."""
    scores = [benchmark.score for result in results if (benchmark := result.benchmark(label))]
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    return low, max(high, low + 1e-6)
