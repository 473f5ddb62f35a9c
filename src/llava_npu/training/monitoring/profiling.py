"""`train --profile STEPS`: a trace of a few steps, and a table of what their time went to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.profiler import record_function

from llava_npu.devices import Device
from llava_npu.devices.profiling import ProfiledOperation, Profiler
from llava_npu.errors import UserError

PROFILES = "profile"  # in the run folder

_STEP, _INPUT = "llava_npu: step", "llava_npu: input"
# What each kind of time is, in the table's order.
_MEANINGS = {
    "input": "waiting for data",
    "host": "nothing to compute: the host prepares work",
    "matrix": "matrix products and convolutions",
    "vector": "everything else that is computed",
    "attention": "attention",
    "communication": "between devices, while nothing is computed",
    "idle": "nothing to compute: the host waits",
}
_COMPUTED = ("attention", "matrix", "vector", "communication")


@dataclass(frozen=True)
class ProfiledSteps:
    """The steps `first` to `last`, both included, counted from 1 as everywhere in a run's output."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> ProfiledSteps:
        """Reads "7" or "5-7".

        Raises:
            UserError: it is neither.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"--profile {text!r}: give a step, as in 20, or the first and the last, as in 20-22.")
        return cls(first, last)

    def check(self, num_steps: int) -> None:
        """Raises `UserError` where a run has fewer steps."""
        if self.last > num_steps:
            raise UserError(f"--profile {self}: the run has {num_steps} steps; give steps from 1 to {num_steps}.")

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class StepProfiler:
    """Profiles some of a run's steps. Every process has one, and writes its own trace; without steps it does nothing.

    Args:
        folder: where traces go.
        console: where the table goes.
    """

    def __init__(self, steps: ProfiledSteps | None, device: Device, folder: Path, console: Console) -> None:
        self._steps = steps
        self._device = device
        self._folder = folder
        self._console = console
        self._profiler: Profiler | None = None

    @contextmanager
    def open(self, first_step: int) -> Iterator[None]:
        """Around the steps that a run makes from `first_step` (made already) on."""
        steps = self._steps
        if steps is not None and steps.first <= first_step:
            left = max(steps.first, first_step + 1), steps.last
            self._steps = ProfiledSteps(*left) if left[0] <= left[1] else None
            rest = f"steps {self._steps} are profiled" if self._steps else "nothing is profiled"
            self._console.print(f"--profile {steps}: step {first_step} was made before; {rest}")
        try:
            yield
        finally:
            if self._profiler is not None:  # a step failed
                self._profiler.stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step and what follows it, such as a checkpoint."""
        steps = self._steps
        if steps is None or not steps.first <= number <= steps.last:
            yield
            return
        if self._profiler is None:
            self._device.synchronize()  # what was given to it before is none of these steps' work
            self._profiler = self._device.profiler(self._folder)
            self._profiler.start()
        with record_function(_STEP):
            yield
            if number == steps.last:
                self._device.synchronize()
        if number == steps.last:
            self._finish(steps)

    def input(self) -> AbstractContextManager[object]:
        """Around waiting for a step's data."""
        context: AbstractContextManager[object] = nullcontext() if self._profiler is None else record_function(_INPUT)
        return context

    def _finish(self, steps: ProfiledSteps) -> None:
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if not self._console.quiet:
            count = steps.last - steps.first + 1
            times = time_by_kind(profiler.operations(), host_computes=profiler.host_computes)
            self._console.print(_table(steps, times, count), f"trace: {self._folder}", sep="\n")


def time_by_kind(operations: Sequence[ProfiledOperation], *, host_computes: bool) -> dict[str, float]:
    """Seconds of each kind between the first step's start and the last one's end; each moment counts once.

    A moment belongs to what the device computes then, else to what it sends, else to what the host does meanwhile.

    Args:
        host_computes: the device is the host, whose operators while it loads data belong to that.
    """
    first = ("input", *_COMPUTED) if host_computes else (*_COMPUTED, "input")
    order = [*first, "idle", "host"]
    spans = sorted(
        (each.start, each.end, order.index(kind)) for each in operations if (kind := _kind(each)) is not None
    )
    window = [each for each in operations if each.name == _STEP]
    if not window:
        return dict.fromkeys(_MEANINGS, 0.0)
    start, end = min(each.start for each in window), max(each.end for each in window)
    edges = sorted(
        (min(max(time, start), end), change, rank)
        for begin, finish, rank in spans
        for time, change in ((begin, 1), (finish, -1))
    )
    nanoseconds = dict.fromkeys(_MEANINGS, 0)
    active, now = [0] * len(order), start
    for time, change, rank in edges:
        busy = next((kind for kind, count in zip(order, active, strict=True) if count), "idle")
        nanoseconds[busy] += time - now
        active[rank] += change
        now = time
    nanoseconds["idle"] += end - now
    return {kind: time / 1e9 for kind, time in nanoseconds.items()}


def _kind(operation: ProfiledOperation) -> str | None:
    if operation.kind == "range":
        return {_STEP: "host", _INPUT: "input"}.get(operation.name)
    return "idle" if operation.kind == "waiting" else operation.kind


def _table(steps: ProfiledSteps, times: dict[str, float], count: int) -> Table:
    total = sum(times.values())
    table = Table(title=f"step {steps}" if count == 1 else f"steps {steps}", title_justify="left")
    for name, side in (("time", "left"), ("share", "right"), ("ms per step", "right"), ("what", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for kind, meaning in _MEANINGS.items():
        share = times[kind] / total if total else 0.0
        table.add_row(kind, f"{share:.1%}", f"{1000 * times[kind] / count:,.1f}", meaning)
    table.add_row("in all", "", f"{1000 * total / count:,.1f}", "")
    return table
