"""What a run reports of a step, and metrics.jsonl, where all of it goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_npu.training.monitoring.jsonl import append_lines, read_lines, rewind_lines
from llava_npu.training.monitoring.throughput import Throughput

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics(Throughput):
    """One optimizer step, and how fast the run was then.

    Attributes:
        step: steps done, this one included.
        epoch: passes over the data done, a fraction.
        loss: cross-entropy in nats per supervised token, over the whole step; None where it is not finite.
        learning_rate: of this step; `learning_rates` has each trained part's own.
        grad_norm: before clipping; None where it is not finite, and the step was skipped.
        supervised_tokens, tokens, samples: in this step, over all devices.
        skipped_steps: how many steps were, from the run's beginning.
        validation_loss: as `loss`, over the samples held out; None where it was not computed. It has a line of its own,
            after that of the step: it is computed once the step and its checkpoint are on the disk.
    """

    step: int
    epoch: float
    loss: float | None
    learning_rate: float
    learning_rates: dict[str, float]
    grad_norm: float | None
    supervised_tokens: int
    tokens: int
    samples: int
    skipped_steps: int = 0
    validation_loss: float | None = None


def append_metrics(folder: Path, metrics: StepMetrics) -> None:
    """Adds a line to metrics.jsonl."""
    append_lines(folder / METRICS, [asdict(metrics)])


def append_validation(folder: Path, step: int, loss: float) -> None:
    """Adds the validation loss after a step to metrics.jsonl."""
    append_lines(folder / METRICS, [{"step": step, "validation_loss": loss}])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Each step of metrics.jsonl, with all that its lines hold; a line cut short by an interruption is left out."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_lines(folder / METRICS):
        steps.setdefault(line["step"], {}).update(line)
    return list(steps.values())


def read_validation_loss(folder: Path, step: int) -> float | None:
    """The validation loss after a step, if metrics.jsonl has it."""
    losses: dict[int, float | None] = {line["step"]: line.get("validation_loss") for line in read_metrics(folder)}
    return losses.get(step)


def rewind_metrics(folder: Path, step: int) -> None:
    """Drops the lines after `step`: a continued run reports them again."""
    rewind_lines(folder / METRICS, step)
