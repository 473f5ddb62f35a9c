"""A whole comparison: the grid, the cells that are still to be run, and a report that is true after each of them.

OUTPUT/
  comparison.yaml    the configuration as it was last run
  cells/             a folder for each cell, see `folder`
  index.html, …      see `report`
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llava_npu.comparison.examples import load_examples
from llava_npu.comparison.folder import Measured, read_failure, read_result, write_cell
from llava_npu.comparison.grid import Cell, expand
from llava_npu.comparison.report import Comparison, write_report
from llava_npu.comparison.scheduler import Event, Slot, all_devices, run_cells, share_out
from llava_npu.comparison.table import Line
from llava_npu.config import render_config
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.data.records import fingerprint
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.run import read_dataset
from llava_npu.files.atomic import write_text
from llava_npu.files.locks import LOCK, locked
from llava_npu.files.output_folder import claim_folder

CONFIGURATION = "comparison.yaml"
_LOCK_PATIENCE_SECONDS = 5.0


def compare(
    config: ComparisonConfig,
    where: str,
    *,
    devices: Sequence[str] = (),
    retry_failed: bool = False,
    console: Console | None = None,
) -> tuple[Path, list[Line]]:
    """Runs every cell of the grid that is not finished, and writes the report.

    Args:
        config: the comparison.
        where: the file that it comes from, for messages.
        devices: cells are spread over these; by default those of the configuration.
        retry_failed: try cells again that failed before; by default they are reported and skipped.
        console: where progress goes.

    Returns:
        the page, and the cells as the table shows them.

    Raises:
        UserError: the configuration, its data or the output folder is wrong; nothing has run then.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    cells = expand(config, where)
    measured = what_is_measured(config, where)
    slots = share_out(all_devices(devices or config.devices), config.devices_per_trial)
    output = config.output_path
    claim_folder(output, CONFIGURATION, "output", "`llava-npu compare`")
    busy = f"output: another comparison is running in {output}. Wait for it, stop it, or give another `output`."
    with locked(output / LOCK, busy=busy, patience=_LOCK_PATIENCE_SECONDS):
        write_text(output / CONFIGURATION, render_config(config))
        waiting = _to_run(cells, measured, retry_failed)
        _introduce(console, cells, waiting, measured, slots)
        for cell in waiting:
            write_cell(cell, measured)
        report = _Report(config, cells, measured)
        with _until_terminated(), _Display(console, len(waiting)) as display:

            def tell(event: Event) -> None:
                display.show(event)
                if event.kind in ("finished", "failed"):
                    report.write()

            run_cells(waiting, slots, tell)
        return report.write(), report.lines()


def what_is_measured(config: ComparisonConfig, where: str) -> Measured:
    """What is measured of every cell; bad data is reported here, before anything is trained."""
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
        raise UserError(f"{where}: benchmarks: {twice[0]!r} is there twice. Tell them apart with `label`.")
    held_out = (config.held_out, fingerprint(config.held_out)) if config.held_out else None
    return Measured(tuple(benchmarks), held_out, config.examples, config.share_features)


class _Report:
    """The report of a grid as far as it has come; the examples' pictures are read once."""

    def __init__(self, config: ComparisonConfig, cells: Sequence[Cell], measured: Measured):
        self._config, self._cells, self._measured = config, cells, measured
        first = config.benchmarks[0] if config.benchmarks else None
        self._examples = load_examples(first, config.examples) if first and config.examples else []

    def lines(self) -> list[Line]:
        return [self._line(cell) for cell in self._cells]

    def _line(self, cell: Cell) -> Line:
        result = read_result(cell.folder, self._measured)
        if result is not None:  # names may have changed since it was run
            result = replace(result, encoder=cell.encoder, projector=cell.projector, varied=cell.varied)
        return Line(cell.encoder, cell.projector, cell.varied, result, read_failure(cell.folder), cell.folder)

    def write(self) -> Path:
        comparison = Comparison(
            title=self._config.title or self._config.output_path.name,
            note=self._config.note or "",
            lines=self.lines(),
            examples=self._examples,
            configuration=render_config(self._config),
            command=shlex.join(["llava-npu", *sys.argv[1:]]) if sys.argv[1:] else "",
        )
        return write_report(comparison, self._config.output_path)


def _to_run(cells: Sequence[Cell], measured: Measured, retry_failed: bool) -> list[Cell]:
    unfinished = [cell for cell in cells if read_result(cell.folder, measured) is None]
    return [cell for cell in unfinished if retry_failed or read_failure(cell.folder) is None]


def _introduce(
    console: Console, cells: Sequence[Cell], waiting: Sequence[Cell], measured: Measured, slots: Sequence[Slot]
) -> None:
    finished = sum(read_result(cell.folder, measured) is not None for cell in cells)
    skipped = [cell for cell in cells if cell not in waiting and read_result(cell.folder, measured) is None]
    console.print(
        f"{len(cells)} cells: {finished} finished, {len(waiting)} to run on {', '.join(map(_place, slots))}"
        + (f", {len(skipped)} that failed before (--retry-failed tries them again)" if skipped else ""),
        highlight=False,
    )


def _place(slot: Slot) -> str:
    return slot.device if slot.processes == 1 else f"{slot.processes} × {slot.device}"


class _Display:
    """A line for each running cell, and one for each that is done."""

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

        key, name = str(event.cell.folder), escape(event.cell.name)
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
    """Being told to end (as by a batch system) is like Ctrl-C: workers are stopped, nothing is left running."""
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
