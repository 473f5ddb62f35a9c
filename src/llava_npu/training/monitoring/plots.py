"""Loss, learning rate and throughput of a run over its steps, as an image and as a page that reloads itself."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.files.atomic import write_bytes
from llava_npu.files.pages import render_page
from llava_npu.training.monitoring.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE = "loss.png"
PAGE = "loss.html"
# Drawing takes about half a second, while the device may run out of work: at most a hundredth of the time goes to it.
MOST_OF_THE_TIME = 0.01
FIRST_SECONDS = 5.0
SECONDS_BETWEEN = 30.0
# A curve has no more points than a screen shows; more of them are averaged.
MOST_POINTS = 1500
_DRAWN = ("loss", "learning_rate", "tokens_per_second")  # of each step


class Plotter:
    """Draws a run's metrics from time to time; not before there is a curve to see."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._next = clock() + FIRST_SECONDS

    def draw_if_due(self) -> None:
        started = self._clock()
        if started >= self._next:
            draw_plots(self._folder)
            now = self._clock()
            self._next = now + max(SECONDS_BETWEEN, (now - started) / MOST_OF_THE_TIME)


def draw_plots(folder: Path) -> None:
    """Writes loss.png and loss.html from metrics.jsonl; nothing without matplotlib or without metrics."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    # A file that was edited, or damaged and repaired, draws what it still has.
    lines = [line for line in read_metrics(folder) if all(isinstance(line.get(key), int | float) for key in _DRAWN)]
    if not lines:
        return
    figure = Figure(figsize=(8, 9), layout="constrained")
    _draw(figure, lines)
    image, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(image, format="png", dpi=110)
    figure.set_layout_engine("none")  # what was laid out once, which takes half the time, stays
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    write_bytes(folder / IMAGE, image.getvalue())
    write_bytes(folder / PAGE, _page(folder.name, drawing.getvalue(), lines[-1]).encode())


def _draw(figure: Figure, lines: Sequence[dict[str, Any]]) -> None:
    loss, rate, speed = figure.subplots(3, sharex=True, height_ratios=[2, 1, 1])
    steps = _thin([line["step"] for line in lines])
    losses = [line["loss"] for line in lines]
    loss.plot(steps, _thin(losses), color="tab:blue", alpha=0.35, linewidth=1)
    loss.plot(steps, _thin(_smooth(losses)), color="tab:blue", linewidth=2)
    held_out = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
    if held_out:
        loss.plot(*zip(*held_out, strict=True), color="tab:red", marker="o", markersize=4, label="validation")
        loss.legend()
    loss.set_ylabel("loss\n(nats per supervised token)")
    rate.plot(steps, _thin([line["learning_rate"] for line in lines]), color="tab:orange")
    rate.set_ylabel("learning rate")
    speed.plot(steps, _thin([line["tokens_per_second"] for line in lines]), color="tab:green")
    speed.set(xlabel="step", ylabel="tokens per second")
    speed.set_ylim(bottom=0)
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.3)


def _page(name: str, drawing: str, latest: dict[str, Any]) -> str:
    from markupsafe import Markup

    rows = [(key.replace("_", " "), _shown(value)) for key, value in latest.items() if not isinstance(value, dict)]
    svg = Markup(drawing[drawing.index("<svg") :])
    seconds = f"{SECONDS_BETWEEN:.0f}"
    return render_page(Path(__file__).parent, "progress.html", title=name, drawing=svg, rows=rows, seconds=seconds)


def _shown(value: Any) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else "–" if value is None else f"{value:,}"


def _thin(values: Sequence[float]) -> list[float]:
    """Means over stretches, so that at most `MOST_POINTS` are left."""
    stretch = -(-len(values) // MOST_POINTS)
    parts = (values[start : start + stretch] for start in range(0, len(values), stretch))
    return [sum(part) / len(part) for part in parts]


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    smoothed: list[float] = []
    total = norm = 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1
        smoothed.append(total / norm if norm else math.nan)
    return smoothed
