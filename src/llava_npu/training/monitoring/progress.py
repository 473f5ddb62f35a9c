"""The progress line of a run: step, loss, learning rate, speed, waiting for data, memory, time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llava_npu.training.monitoring.metrics import StepMetrics
from llava_npu.training.monitoring.throughput import DevicePeak

_WAITS = 0.1  # for data, from this part of the time on: below, it is not what a run could be made faster by


class TrainingProgress:
    """Shows metrics as they come; without a terminal, a plain line now and then.

    Attributes:
        peak: what MFU is against; None where it is unknown.
    """

    def __init__(self, console: Console, progress: Progress, num_steps: int):
        self._console = console
        self._progress = progress
        self._num_steps = num_steps
        self.peak: DevicePeak | None = None
        self._task = progress.add_task("train", total=num_steps, report="")
        self._line_every = max(1, num_steps // 20)

    def show(self, metrics: StepMetrics) -> None:
        report = (
            f"{_loss(metrics)} · lr {metrics.learning_rate:.2e} · "
            f"{metrics.tokens_per_second:,.0f} tokens/s · {metrics.samples_per_second:.1f} samples/s"
            f"{self._mfu(metrics)}{_input_wait(metrics)} · {metrics.peak_memory_gib:.1f} GiB"
        )
        self._progress.update(self._task, completed=metrics.step, report=report)
        if not self._console.is_terminal and (
            metrics.step % self._line_every == 0 or metrics.step in (1, self._num_steps)
        ):
            left = timedelta(seconds=round(metrics.seconds_left))
            self._console.print(f"step {metrics.step}/{self._num_steps} · {report} · {left} left")

    def _mfu(self, metrics: StepMetrics) -> str:
        if metrics.mfu is not None:
            return f" · MFU {metrics.mfu:.0%}"
        return "" if self.peak is None else f" · MFU unknown (faster than the {self.peak.source} peak)"

    def show_validation(self, step: int, loss: float) -> None:
        self._console.print(f"step {step}/{self._num_steps} · validation {loss:.4f}")


def _loss(metrics: StepMetrics) -> str:
    return "skipped" if metrics.loss is None or metrics.grad_norm is None else f"loss {metrics.loss:.4f}"


def _input_wait(metrics: StepMetrics) -> str:
    return f" · waiting for data {metrics.input_wait:.0%}" if metrics.input_wait >= _WAITS else ""


@contextmanager
def training_progress(
    console: Console, title: str, num_steps: int, done: int, visible: bool
) -> Iterator[TrainingProgress]:
    """A progress line for `num_steps` steps, of which `done` are behind us."""
    columns = (
        TextColumn(f"[bold]{title}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[report]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (visible and console.is_terminal)) as progress:
        shown = TrainingProgress(console, progress, num_steps)
        progress.update(progress.task_ids[0], completed=done)
        yield shown
