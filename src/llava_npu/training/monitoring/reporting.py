"""Where a step's metrics go: metrics.jsonl, the terminal, the plots, the trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from llava_npu.config import RunConfig
from llava_npu.training.monitoring.metrics import StepMetrics, append_metrics, append_validation
from llava_npu.training.monitoring.plots import Plotter
from llava_npu.training.monitoring.progress import TrainingProgress
from llava_npu.training.monitoring.trackers import Trackers, open_trackers


class RunReport:
    """Reports a run's steps; one process of a run has it."""

    def __init__(self, folder: Path, progress: TrainingProgress, trackers: Trackers) -> None:
        self._folder = folder
        self._progress = progress
        self._trackers = trackers
        self._plotter = Plotter(folder)

    def step(self, metrics: StepMetrics) -> None:
        """Reports a step that was made."""
        append_metrics(self._folder, metrics)
        self._progress.show(metrics)
        self._trackers.log(asdict(metrics), metrics.step)
        self._plotter.draw_if_due()

    def validation(self, step: int, loss: float) -> None:
        """Reports the validation loss after a step, which was reported before."""
        append_validation(self._folder, step, loss)
        self._progress.show_validation(step, loss)
        self._trackers.log({"validation_loss": loss}, step)


@contextmanager
def open_report(config: RunConfig, folder: Path, progress: TrainingProgress, console: Console) -> Iterator[RunReport]:
    """Opens all that a run reports to.

    Raises:
        UserError: a tracker cannot be started.
    """
    trackers = open_trackers(config.trackers, folder, config.model_dump(mode="json"), console)
    try:
        yield RunReport(folder, progress, trackers)
    finally:
        trackers.finish()
