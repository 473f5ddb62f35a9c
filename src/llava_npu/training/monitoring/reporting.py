"""Where a step's metrics go: metrics.jsonl, the terminal, the plots, the trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from llava_npu.config import RunConfig
from llava_npu.training.monitoring.metrics import StepMetrics, append_metrics
from llava_npu.training.monitoring.plots import Plotter
from llava_npu.training.monitoring.progress import TrainingProgress
from llava_npu.training.monitoring.trackers import open_trackers


@contextmanager
def open_report(
    config: RunConfig, folder: Path, progress: TrainingProgress, console: Console
) -> Iterator[Callable[[StepMetrics], None]]:
    """Gives the function that reports a step; one process of a run calls it.

    Raises:
        UserError: a tracker cannot be started.
    """
    trackers = open_trackers(config.trackers, folder, config.model_dump(mode="json"), console)
    plotter = Plotter(folder)

    def report(metrics: StepMetrics) -> None:
        append_metrics(folder, metrics)
        progress.show(metrics)
        trackers.log(asdict(metrics), metrics.step)
        plotter.draw_if_due()

    try:
        yield report
    finally:
        trackers.finish()
