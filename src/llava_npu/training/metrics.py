"""What a run reports of a step, and metrics.jsonl, where all of it goes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


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
        tokens_per_second, …: see `throughput.Throughput`.
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
    tflops_per_device: float
    mfu: float | None
    peak_memory_gib: float
    seconds: float
    seconds_left: float


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


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
