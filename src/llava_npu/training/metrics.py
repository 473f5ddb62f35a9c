"""What a run reports: metrics.jsonl, a loss plot, a line in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
PLOT = "loss.png"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        epoch: passes over the data done, a fraction.
        loss: cross-entropy in nats per supervised token, over the whole step.
        learning_rate: of this step; `learning_rates` has each trained part's own.
        grad_norm: before clipping.
        supervised_tokens, tokens, samples: in this step, over all devices.
        tokens_per_second, samples_per_second: since the last report.
        seconds: since the run's start or continuation.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    learning_rates: dict[str, float]
    grad_norm: float
    supervised_tokens: int
    tokens: int
    samples: int
    tokens_per_second: float
    samples_per_second: float
    seconds: float


def append_metrics(folder: Path, metrics: StepMetrics) -> None:
    """Adds a line to metrics.jsonl."""
    with (folder / METRICS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(metrics)) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl; a line cut short by an interruption is left out."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def rewind_metrics(folder: Path, step: int) -> None:
    """Drops the lines after `step`: a continued run reports them again."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    _write(folder / METRICS, kept)


def plot_loss(folder: Path) -> None:
    """Draws loss and learning rate over the steps into loss.png; without matplotlib there is no plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_metrics(folder)
    if not lines:
        return
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss_axes = figure.add_subplot()
    loss_axes.plot(steps, [line["loss"] for line in lines], color="tab:blue", alpha=0.35, linewidth=1)
    loss_axes.plot(steps, _smooth([line["loss"] for line in lines]), color="tab:blue", linewidth=2)
    loss_axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    rate_axes = loss_axes.twinx()
    rate_axes.plot(steps, [line["learning_rate"] for line in lines], color="tab:orange", linewidth=1)
    rate_axes.set_ylabel("learning rate")
    partial = folder / f".{PLOT}"
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(folder / PLOT)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    smoothed: list[float] = []
    total = norm = 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        smoothed.append(total / norm)
    return smoothed


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
