"""A whole comparison: the grid, the trials that are still to be run, and a report that is up to date after each.

OUTPUT/
  comparison.yaml    the configuration as it was last run
  trials/             a folder for each trial, see `folder`
  index.html, …      see `report`
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llava_npu.comparison.examples import load_examples
from llava_npu.comparison.folder import Measured, read_failure, read_result, write_trial
from llava_npu.comparison.grid import Trial, expand
from llava_npu.comparison.report import ComparisonReport, write_report
from llava_npu.comparison.scheduler import Event, Slot, all_devices, run_trials, share_out
from llava_npu.comparison.table import TrialRow
from llava_npu.config import render_config
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.data.holdout import content_ids
from llava_npu.data.records import fingerprint, open_records
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.files.atomic import write_text
from llava_npu.files.console import SafeConsole
from llava_npu.files.locks import LOCK, locked
from llava_npu.files.output_folder import claim_folder
from llava_npu.training.data import open_run_data

CONFIGURATION = "comparison.yaml"
_LOCK_PATIENCE_SECONDS = 5.0


def compare(
    config: ComparisonConfig,
    where: str,
    *,
    devices: Sequence[str] = (),
    retry_failed: bool = False,
    console: Console | None = None,
) -> tuple[Path, list[TrialRow]]:
    """Runs every trial of the grid that is not finished, and writes the report.

    Args:
        config: the comparison.
        where: the file that it comes from, for messages.
        devices: trials are spread over these; by default those of the configuration.
        retry_failed: retry trials that failed before; by default they are reported and skipped.
        console: where progress goes.

    Returns:
        the page, and the trials as the table shows them.

    Raises:
        UserError: the configuration, its data or the output folder is wrong; nothing has run then.
    """
    console = console or SafeConsole(stderr=True, soft_wrap=True)
    trials = expand(config, where)
    measured = what_is_measured(config, where)
    slots = share_out(all_devices(devices or config.devices), config.devices_per_trial)
    output = config.output_path
    claim_folder(output, CONFIGURATION, "output", "`llava-npu compare`")
    busy = f"output: another comparison is running in {output}. Wait for it, stop it, or give another `output`."
    with locked(output / LOCK, busy=busy, patience=_LOCK_PATIENCE_SECONDS):
        write_text(output / CONFIGURATION, render_config(config))
        waiting = _to_run(trials, measured, retry_failed)
        _introduce(console, trials, waiting, measured, slots)
        for trial in waiting:
            write_trial(trial, measured)
        warning = trained_on(config.held_out, trials) if config.held_out else ""
        if warning:
            console.print(warning, style="yellow", highlight=False, markup=False)
        report = _Report(config, trials, measured, warning)
        with _until_terminated(), _Display(console, len(waiting)) as display:

            def tell(event: Event) -> None:
                display.show(event)
                if event.kind in ("finished", "failed"):
                    report.write()

            run_trials(waiting, slots, tell)
        return report.write(), report.lines()


def what_is_measured(config: ComparisonConfig, where: str) -> Measured:
    """What is measured of every trial; bad data is reported here, before anything is trained."""
    benchmarks = []
    labels: list[str] = []
    for number, benchmark in enumerate(config.benchmarks):
        try:
            dataset = read_dataset(get(benchmark.name), Path(benchmark.data))
        except UserError as error:
            raise UserError(f"{where}: benchmarks[{number}]: {error}") from error
        benchmarks.append((benchmark, dataset.sha256))
        labels.append(benchmark.label or benchmark.name)
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{where}: benchmarks: {twice[0]!r} appears twice; give each a `label` of its own.")
    held_out = (config.held_out, fingerprint(config.held_out)) if config.held_out else None
    return Measured(tuple(benchmarks), held_out, config.examples, config.share_features)


def trained_on(held_out: str, trials: Sequence[Trial]) -> str:
    """Says how many of the held-out captions a stage is trained on, by content; "" if none."""
    held = open_records(held_out)
    stages = [("align", trial.align) for trial in trials]
    stages += [("finetune", trial.finetune) for trial in trials if trial.finetune is not None]
    found: dict[str, int] = {}
    for stage, data in {run.data.model_dump_json(): (stage, run.data) for stage, run in stages}.values():
        with suppress(UserError):  # a trial whose data cannot be read says so itself
            of_held, of_training = content_ids(held, open_run_data(data).training)
            count = int(np.count_nonzero(np.isin(of_held, of_training)))
            found[stage] = max(count, found.get(stage, 0))
    listed = " and ".join(f"{count:,} in {stage}" for stage, count in found.items() if count)
    if not listed:
        return ""
    return (
        f"held_out: of its {len(held):,} captions {listed} are trained on. Their loss says how well they are learned."
    )


class _Report:
    """The report of a grid as far as it has come; the examples' images are read once."""

    def __init__(self, config: ComparisonConfig, trials: Sequence[Trial], measured: Measured, warning: str):
        self._config, self._trials, self._measured, self._warning = config, trials, measured, warning
        first = config.benchmarks[0] if config.benchmarks else None
        self._examples = load_examples(first, config.examples) if first and config.examples else []

    def lines(self) -> list[TrialRow]:
        return [self._line(trial) for trial in self._trials]

    def _line(self, trial: Trial) -> TrialRow:
        result = read_result(trial.folder, self._measured)
        if result is not None:  # names may have changed since it was run
            result = replace(result, encoder=trial.encoder, projector=trial.projector, varied=trial.varied)
        return TrialRow(trial.encoder, trial.projector, trial.varied, result, read_failure(trial.folder), trial.folder)

    def write(self) -> Path:
        comparison = ComparisonReport(
            title=self._config.title or self._config.output_path.name,
            note=" ".join(filter(None, (self._config.note, self._warning))),
            lines=self.lines(),
            examples=self._examples,
            configuration=render_config(self._config),
            correction=self._config.correction,
            command=shlex.join(["llava-npu", *sys.argv[1:]]) if sys.argv[1:] else "",
        )
        return write_report(comparison, self._config.output_path)


def _to_run(trials: Sequence[Trial], measured: Measured, retry_failed: bool) -> list[Trial]:
    unfinished = [trial for trial in trials if read_result(trial.folder, measured) is None]
    return [trial for trial in unfinished if retry_failed or read_failure(trial.folder) is None]


def _introduce(
    console: Console, trials: Sequence[Trial], waiting: Sequence[Trial], measured: Measured, slots: Sequence[Slot]
) -> None:
    finished = sum(read_result(trial.folder, measured) is not None for trial in trials)
    skipped = [trial for trial in trials if trial not in waiting and read_result(trial.folder, measured) is None]
    console.print(
        f"{len(trials)} trials: {finished} finished, {len(waiting)} to run on {', '.join(map(_place, slots))}"
        + (f", {len(skipped)} that failed before (--retry-failed runs them again)" if skipped else ""),
        highlight=False,
    )


def _place(slot: Slot) -> str:
    return slot.device if slot.processes == 1 else f"{slot.processes} × {slot.device}"


class _Display:
    """A line for each running trial, and one for each finished one."""

    def __init__(self, console: Console, total: int):
        self._console, self._total, self._done = console, total, 0
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        from rich.markup import escape

        key, name = str(event.trial.folder), escape(event.trial.name)
        if event.kind == "started":
            self._tasks[key] = self._progress.add_task(f"[bold]{name}[/] on {_place(event.slot)}")
        elif event.kind == "line":
            text = f"[bold]{name}[/] on {_place(event.slot)}: [dim]{escape(event.text)}[/]"
            self._progress.update(self._tasks[key], description=text)
        else:
            self._progress.remove_task(self._tasks.pop(key))
            self._done += 1
            minutes, seconds = divmod(round(event.seconds), 60)
            head = f"[{self._done}/{self._total}] {name}: "
            if event.kind == "finished":
                self._console.print(f"{head}[green]finished[/] in {minutes}:{seconds:02}", highlight=False)
            else:
                self._console.print(f"{head}[red]not finished[/]: {escape(event.text)}", highlight=False)


@contextmanager
def _until_terminated() -> Iterator[None]:
    """SIGTERM (as sent by a batch system) acts like Ctrl-C: workers are stopped, nothing is left running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
