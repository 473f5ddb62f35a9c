"""Which models are worth their price: those that no other beats in both score and cost, and the plot of all."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llava_npu.comparison.results import Estimate, Result
from llava_npu.comparison.table import HELD_OUT_LOSS, labels

# Okabe and Ito's palette and more in its manner: tells hues apart on white and on black, and for the colour-blind.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8f6bb8", "#b0a100", "#7f7f7f", "#a8563a",
    "#4c6b1f", "#e0567f",
)  # fmt: skip
MARKERS = "osD^vP*X"
_GREY = "#8a8a8a"
_SIDE_BY_SIDE = 1.09  # factor between points of equally many tokens
_WIDEST = 2.1  # factor between the outermost of them, within the plot's edges
_EDGE = 1.6  # factor from the fewest and the most tokens to the edges


@dataclass(frozen=True)
class Axis:
    """A cost: what it is called, and how it is read of a result."""

    title: str
    cost: Callable[[Result], float | None]
    logarithmic: bool


@dataclass(frozen=True)
class Measure:
    """What a model is worth: how it is called, and how it is read of a result.

    Attributes:
        title, unit: as the plot says them.
        value: of a result; None where it was not measured.
        scale: from the value to the unit.
        higher_is_better: or lower.
        chance: what guessing gives, where one can say.
    """

    title: str
    unit: str
    value: Callable[[Result], Estimate | None]
    scale: float
    higher_is_better: bool
    chance: float | None = None


AXES = (
    Axis("visual tokens per image", lambda result: result.visual_tokens, logarithmic=True),
    Axis("time to first token, ms", lambda r: r.first_token.value if r.first_token else None, logarithmic=False),
)


def measures(results: Sequence[Result]) -> list[Measure]:
    """The benchmarks in their order, then the held-out loss."""
    found = [_of_benchmark(results, label) for label in labels(results)]
    if any(result.held_out_loss for result in results):
        found.append(
            Measure(HELD_OUT_LOSS, "nats per token", lambda r: r.held_out_loss, scale=1, higher_is_better=False)
        )
    return found


def _of_benchmark(results: Sequence[Result], label: str) -> Measure:
    def value(result: Result) -> Estimate | None:
        benchmark = result.benchmark(label)
        return benchmark.score if benchmark else None

    chance = next((b.chance for r in results if (b := r.benchmark(label)) and b.chance is not None), None)
    return Measure(label, "%", value, scale=100, higher_is_better=True, chance=chance)


def frontier(results: Sequence[Result], measure: Measure, cost: Callable[[Result], float | None]) -> list[Result]:
    """Results that no other equals or beats at the same cost or less, the cheapest first."""
    sign = -1 if measure.higher_is_better else 1
    priced = [
        (price, sign * value.value, number)
        for number, result in enumerate(results)
        if (price := cost(result)) is not None and (value := measure.value(result)) is not None
    ]
    best = float("inf")
    kept: list[Result] = []
    for _, badness, number in sorted(priced):
        if badness < best:
            best = badness
            kept.append(results[number])
    return kept


def colours(results: Sequence[Result]) -> dict[str, str]:
    """A colour for each projector."""
    names = list(dict.fromkeys(result.projector for result in results))
    return {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}


def draw(results: Sequence[Result], measure: Measure) -> Any:
    """A matplotlib figure of a measure against each cost; upwards and to the left is better.

    Each point has the id "point-N-AXIS", N being its place in `results`; its interval has the same and "-interval".
    """
    from matplotlib.figure import Figure

    axes_shown = [axis for axis in AXES if any(axis.cost(result) is not None for result in results)]
    figure = Figure(figsize=(5.6 * len(axes_shown) + 1.2, 4.6), layout="constrained")
    panels = figure.subplots(1, len(axes_shown), squeeze=False, sharey=True)[0]
    for number, (axis, panel) in enumerate(zip(axes_shown, panels, strict=True)):
        _draw_panel(panel, axis, number, results, measure)
    panels[0].set_ylabel(f"{measure.title}, {measure.unit}", fontsize=11)
    if not measure.higher_is_better:
        panels[0].invert_yaxis()
    _legend(figure, results)
    return figure


def as_svg(figure: Any) -> str:
    """The figure as an SVG element for a page, text as text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llava-npu"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def as_png(figure: Any) -> bytes:
    """The figure as an image on white."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, facecolor="white")
    return data.getvalue()


def _encoders(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.encoder for result in results))


def _draw_panel(panel: Any, axis: Axis, number: int, results: Sequence[Result], measure: Measure) -> None:
    hues, encoders = colours(results), _encoders(results)
    places = _places(results, measure, axis)
    best = frontier(results, measure, axis.cost)
    for index, (x, y, low, high) in places.items():
        result = results[index]
        hue, marker = hues[result.projector], MARKERS[encoders.index(result.encoder) % len(MARKERS)]
        (interval,) = panel.plot(
            [x, x], [low, high], color=hue, alpha=0.35, linewidth=2.2, solid_capstyle="round", zorder=2
        )
        interval.set_gid(f"point-{index}-{number}-interval")
        size = 11 if marker == "*" else 8
        edge = "black" if result in best else "white"
        (point,) = panel.plot(
            x, y, marker, color=hue, markersize=size, markeredgecolor=edge, markeredgewidth=1.1, zorder=4
        )
        point.set_gid(f"point-{index}-{number}")
    if len(best) > 1:
        corners = [places[results.index(result)][:2] for result in best]
        panel.step(*zip(*corners, strict=True), where="post", color=_GREY, linewidth=1.4, linestyle="--", zorder=1)
    if measure.chance is not None:
        chance = measure.scale * measure.chance
        panel.axhline(chance, color=_GREY, linewidth=1, linestyle=":", zorder=0)
        panel.annotate(
            "guessing", (1, chance), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", fontsize=8.5, color=_GREY,
        )  # fmt: skip
    if axis.logarithmic:
        tokens = sorted({int(axis.cost(result) or 0) for result in results})
        panel.set_xscale("log", base=2)
        panel.set_xticks(tokens, [str(count) for count in tokens])
        panel.set_xticks([], minor=True)
        panel.set_xlim(tokens[0] / _EDGE, tokens[-1] * _EDGE)
    panel.set_xlabel(axis.title, fontsize=11)
    panel.grid(color=_GREY, alpha=0.18)
    panel.tick_params(colors=_GREY, labelcolor="black", labelsize=9.5)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(_GREY)


def _places(results: Sequence[Result], measure: Measure, axis: Axis) -> dict[int, tuple[float, float, float, float]]:
    """Index of a result → x, value and interval; points of equally many tokens stand side by side."""
    at: dict[float, list[int]] = defaultdict(list)
    for index, result in enumerate(results):
        if (cost := axis.cost(result)) is not None and measure.value(result) is not None:
            at[cost].append(index)
    places = {}
    for cost, indices in at.items():
        step = _step(len(indices), sorted(at)) if axis.logarithmic else 1.0
        for rank, index in enumerate(indices):
            shift = step ** (rank - (len(indices) - 1) / 2)
            found = measure.value(results[index])
            assert found is not None
            value, low, high = (measure.scale * number for number in (found.value, found.low, found.high))
            places[index] = (cost * shift, value, low, high)
    return places


def _step(count: int, costs: Sequence[float]) -> float:
    """The factor between points that stand side by side: they keep off the edges and their neighbours' places."""
    nearest = min((after / before for before, after in pairwise(costs)), default=_WIDEST**2)
    return min(_SIDE_BY_SIDE, min(_WIDEST, nearest**0.7) ** (1 / max(1, count - 1)))


def _legend(figure: Any, results: Sequence[Result]) -> None:
    from matplotlib.lines import Line2D

    hues, encoders = colours(results), _encoders(results)

    handles = [
        Line2D([], [], marker="o", linestyle="", color=hue, markersize=7, label=name) for name, hue in hues.items()
    ]
    if len(encoders) > 1:
        handles += [
            Line2D([], [], marker=MARKERS[place % len(MARKERS)], linestyle="", color=_GREY, markersize=7, label=name)
            for place, name in enumerate(encoders)
        ]
    handles.append(Line2D([], [], linestyle="--", color=_GREY, label="no model is better and cheaper"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9.5)
