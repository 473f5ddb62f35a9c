"""Several benchmarks at once: a radar plot of the models that have a score on all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_npu.comparison import pareto
from llava_npu.comparison.results import Result
from llava_npu.comparison.table import labels

LEAST_AXES = 3  # fewer make no area
MOST_MODELS = 8  # more cannot be told apart
_INNERMOST = 0.15  # where the worst model of an axis is; the best is at 1
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Radar:
    """What is drawn.

    Attributes:
        benchmarks: an axis each.
        models: those drawn, the best first.
        left_out: names of those that are not: without a score on one of the benchmarks, or beyond `MOST_MODELS`.
    """

    benchmarks: tuple[str, ...]
    models: tuple[Result, ...]
    left_out: tuple[str, ...]

    def scores(self, benchmark: str) -> list[float]:
        """Of each model, from 0 to 1."""
        return [_score(model, benchmark) for model in self.models]

    def places(self, benchmark: str) -> list[float]:
        """Of each model, how far out it is: an axis runs from the lowest score of these models to the highest."""
        scores = self.scores(benchmark)
        low, high = min(scores), max(scores)
        if high == low:
            return [1.0] * len(scores)
        return [_INNERMOST + (1 - _INNERMOST) * (score - low) / (high - low) for score in scores]


def choose(results: Sequence[Result]) -> Radar | None:
    """The models and benchmarks to draw; None where there are fewer than three benchmarks or two models.

    Models come by their mean place among the others over the benchmarks, so that no benchmark's scale decides.
    """
    benchmarks = tuple(labels(results))
    whole = [each for each in results if all(each.benchmark(label) is not None for label in benchmarks)]
    if len(benchmarks) < LEAST_AXES or len(whole) < 2:
        return None
    ranked = Radar(benchmarks, tuple(whole), ())
    places = [sum(place) for place in zip(*(ranked.places(label) for label in benchmarks), strict=True)]
    order = sorted(range(len(whole)), key=lambda number: -places[number])
    models = [whole[number] for number in order[:MOST_MODELS]]
    return Radar(benchmarks, tuple(models), tuple(each.name for each in results if each not in models))


def draw(radar: Radar, results: Sequence[Result]) -> Any:
    """A matplotlib figure; projectors have the colours of the other plots, encoders a kind of line each.

    Args:
        results: all of the comparison, which decide the colours.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.8, 5.4), layout="constrained")
    panel: Any = figure.add_subplot(projection="polar")  # matplotlib declares ordinary axes
    panel.set_theta_zero_location("N")
    panel.set_theta_direction(-1)
    angles = [2 * math.pi * number / len(radar.benchmarks) for number in range(len(radar.benchmarks))]
    hues, encoders = pareto.colours(results), list(dict.fromkeys(result.encoder for result in results))
    by_model = zip(*(radar.places(label) for label in radar.benchmarks), strict=True)
    for number, (model, places) in enumerate(zip(radar.models, by_model, strict=True)):
        hue, line = hues[model.projector], _LINES[encoders.index(model.encoder) % len(_LINES)]
        closed = [*places, places[0]]
        (outline,) = panel.plot([*angles, angles[0]], closed, line, color=hue, linewidth=1.8, label=model.name)
        outline.set_gid(f"radar-{number}")
        panel.fill([*angles, angles[0]], closed, color=hue, alpha=0.06)
    panel.set_xticks(angles, [_axis_label(radar, label) for label in radar.benchmarks], fontsize=9.5)
    panel.tick_params(axis="x", pad=18)  # names keep off the outlines
    panel.set_yticks([])
    panel.set_ylim(0, 1.05)
    panel.spines["polar"].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9.5)
    return figure


def _axis_label(radar: Radar, benchmark: str) -> str:
    scores = radar.scores(benchmark)
    return f"{benchmark}\n{100 * min(scores):.1f}–{100 * max(scores):.1f} %"


def _score(result: Result, benchmark: str) -> float:
    found = result.benchmark(benchmark)
    assert found is not None
    return found.score.value
