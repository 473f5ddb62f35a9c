"""Monitoring a run: after which steps it is measured, validated and reported, and where that goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset
from llava_npu.training.batches import MicroBatch
from llava_npu.training.engines import Engine
from llava_npu.training.monitoring.metrics import StepMetrics, append_metrics, append_validation, read_validation_loss
from llava_npu.training.monitoring.observing import Observer
from llava_npu.training.monitoring.plots import Plotter
from llava_npu.training.monitoring.progress import TrainingProgress, training_progress
from llava_npu.training.monitoring.throughput import ThroughputMeter
from llava_npu.training.monitoring.trackers import Trackers, open_trackers
from llava_npu.training.nonfinite.guard import NonFiniteGuard
from llava_npu.training.resolve import ResolvedRun
from llava_npu.training.step_statistics import StepStatistics
from llava_npu.training.validation import is_due, validation_loss


@dataclass(frozen=True)
class TrainedStep:
    """A step that was made; `loss` is this process's part of the mean loss and still on the device."""

    number: int
    loss: torch.Tensor
    learning_rate_factor: float
    statistics: StepStatistics
    micro_batches: Sequence[MicroBatch]


@dataclass(frozen=True)
class MonitoredRun:
    """What a monitor needs to know of its run: which steps are made, by which engine, and where that is shown."""

    run: ResolvedRun
    engine: Engine
    first_step: int
    num_steps: int
    console: Console


class RunReport:
    """Where a step's metrics go: metrics.jsonl, the terminal, the plots, the trackers. One process of a run has it."""

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


class Monitor:
    """Every process has one, and calls the same methods between the same steps. None of them waits for the device,
    but for `flush` and for validation.
    """

    def __init__(
        self, run: MonitoredRun, meter: ThroughputMeter, guard: NonFiniteGuard, held_out: ConversationDataset
    ) -> None:
        self._run = run
        self._config = run.run.config
        self._accelerator = run.engine.accelerator
        self._meter = meter
        self._guard = guard
        self._held_out = held_out
        self._observer: Observer
        self._report: RunReport | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keeps the progress line, the metrics file and the trackers open; the main process alone has them."""
        run, is_main = self._run, self._accelerator.is_main_process
        with (
            training_progress(run.console, self._config.stage, run.num_steps, run.first_step, is_main) as progress,
            open_report(self._config, self._config.output_path, progress, run.console)
            if is_main
            else nullcontext() as report,
        ):
            progress.peak = self._meter.peak
            self._report = report
            self._observer = Observer(run.run.device, self._guard, report.step if report else None)
            yield

    def ready(self) -> bool:
        """Whether an earlier step's numbers have come to the host, in this process."""
        return self._observer.ready()

    def poll(self) -> None:
        """Looks at the oldest of them, which have arrived in every process."""
        self._observer.poll()

    def flush(self) -> None:
        """Waits for the numbers of every step that was made, and looks at them."""
        self._observer.finish()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around what gets the next step's data: what the device stands still for is reported."""
        before = self._run.run.device.mark()
        yield
        self._meter.waited(before, self._run.run.device.mark())

    def record(self, step: TrainedStep) -> None:
        """Takes note of a step; where it is to be reported, sends its numbers on their way to the host."""
        config, num_steps = self._config, self._run.num_steps
        self._meter.add(step.micro_batches, tokens=step.statistics.tokens, samples=config.batch_size)
        if not (self.validates(step.number) or step.number % config.log_every == 0 or step.number == num_steps):
            return
        speed = self._meter.report(num_steps - step.number)
        self._observer.observe(self._accelerator.reduce(step.loss), self._known(step), speed)

    def validates(self, step: int) -> bool:
        """Whether the validation loss is computed after this step."""
        validation = self._config.data.validation
        return validation is not None and is_due(step, self._run.num_steps, validation.every)

    def misses_validation(self, step: int) -> bool:
        """Whether an earlier start of the run ended between this step's checkpoint and its validation."""
        if step == 0 or not self.validates(step):
            return False
        known = self._accelerator.is_main_process and read_validation_loss(self._config.output_path, step) is not None
        missing: bool = broadcast_object_list([not known])[0]
        return missing

    def _known(self, step: TrainedStep) -> dict[str, object]:
        """What the host knows of a step without the device, as `StepMetrics` has it."""
        config, factor = self._config, step.learning_rate_factor
        return {
            "step": step.number,
            "epoch": step.number * config.batch_size / len(self._run.run.data.training),
            "learning_rate": config.optimizer.learning_rate * factor,
            "learning_rates": {
                name: part.learning_rate * factor
                for name, part in config.resolved_parts.items()
                if part.train != "frozen"
            },
            "supervised_tokens": step.statistics.supervised_tokens,
            "tokens": step.statistics.tokens,
            "samples": config.batch_size,
        }

    def validate(self, step: int) -> float:
        """Computes the validation loss after a step, and reports it; every process calls it."""
        loss = validation_loss(self._run.engine, self._held_out, self._run.run.device, self._config)
        if self._report is not None:
            self._report.validation(step, loss)
        self._meter.resume()
        return loss
