"""A run that is killed again and again, at points of its code, and started again each time.

    python killed_runs.py CONFIG.json NUM_PROCESSES POINT …

A point is one of

    SCOPE:N      SIGKILL before the Nth line of Python that the process runs in that scope (`SCOPES`), whoever wrote it
    torn:N       the end (SIGXFSZ, of which it gets no word) in the middle of a write, N bytes of a file being there
    full         no space is left on the disk
    none         nothing
    count        nothing; prints how many lines there are in each scope

each in process 0, or in process 1 as `step:9@1`; the others of that start are killed too. Imports once and forks for
every start, which is what makes it cheap. Prints, for each start, the point, how each process ended and, if one died,
where.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib.figure  # noqa: F401  what a run imports late is imported once, here
import peft  # noqa: F401
from rich.console import Console

import llava_npu.training
from llava_npu.config import RunConfig
from llava_npu.distributed.launching import meeting_port
from llava_npu.errors import UserError
from llava_npu.training import trainer as loop
from llava_npu.training.checkpointing import saving
from llava_npu.training.engines import ddp, fsdp2
from llava_npu.training.monitoring import monitor

SCOPES = (
    "step",  # forward, backward and optimizer
    "save",  # a checkpoint is written and gets its name
    "cleanup",  # from then on, until nothing of older ones is left
    "export",  # the final model takes the checkpoints' place
    "anywhere",  # in this project's code of training: starting, continuing and reporting too
)
_TRAINING = str(Path(llava_npu.training.__file__).parent)


class _Lines:
    """Counts the lines that run in each scope; before line `number` of `scope` the process dies."""

    def __init__(self, scope: str | None = None, number: int = 0) -> None:
        self.counts = dict.fromkeys(SCOPES, 0)
        self._scope, self._number = scope, number

    def within(self, scope: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, what runs in which is counted for `scope`."""
        if self._scope not in (None, scope):
            return function

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if scope == "anywhere" and not frame.f_code.co_filename.startswith(_TRAINING):
                return None
            if event == "line":
                self.counts[scope] += 1
                if self.counts[scope] == self._number:
                    _die(f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_qualname}")
            return trace

        def call(*arguments: Any, **options: Any) -> Any:
            outer = sys.gettrace()
            if scope == "anywhere":
                threading.settrace(trace)
            sys.settrace(trace)
            try:
                return function(*arguments, **options)
            finally:
                sys.settrace(outer)

        return call


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once and as a whole, whatever other processes say


def _die(place: str) -> None:
    _say(f"  {place}")
    os.kill(os.getpid(), signal.SIGKILL)


def _with_room_for(size: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """No file grows beyond `size` bytes from `function` on."""

    def call(*arguments: Any, **options: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return function(*arguments, **options)

    return call


def _arm(point: str) -> _Lines | None:
    """Puts the end of this process where `point` says."""
    kind, _, number = point.partition(":")
    if kind in ("torn", "full"):
        if kind == "torn":  # the write ends short, and the system ends the process: Python would go on with an error
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        saving.Saver._write = _with_room_for(int(number or 20_000), saving.Saver._write)
    elif kind in SCOPES or kind == "count":
        lines = _Lines() if kind == "count" else _Lines(kind, int(number))
        loop._accumulate = lines.within("step", loop._accumulate)
        for engine in (ddp.DdpEngine, fsdp2.Fsdp2Engine):
            engine.step = lines.within("step", engine.step)
        saving.Saver._write = lines.within("save", saving.Saver._write)
        saving.prune = lines.within("cleanup", saving.prune)
        loop.write_folder = lines.within("export", loop.write_folder)
        loop.prune = lines.within("export", loop.prune)
        loop.Trainer.fit = lines.within("anywhere", loop.Trainer.fit)
        return lines
    elif kind != "none":
        raise ValueError(point)
    return None


def _process(config: RunConfig, rank: int, processes: int, port: int, point: str) -> None:
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    loop.find_peak = lambda *_: None  # which is measured for a second
    monitor.Plotter.draw_if_due = loop.draw_plots = lambda *_: None
    point, _, at = point.partition("@")
    lines = _arm(point) if int(at or 0) == rank or point == "count" else None
    status = 0
    try:
        loop.train(config, console=Console(file=sys.stderr))
    except UserError as error:
        _say(f"error: {str(error).partition(' (')[0]}")
        status = 2
    if point == "count" and lines is not None:
        _say(" ".join(["  lines", str(rank), *(f"{scope}={count}" for scope, count in lines.counts.items())]))
    os._exit(status)


def _start(config: RunConfig, processes: int, point: str) -> list[int]:
    """Starts the run; returns how each process ended, as `waitstatus_to_exitcode` gives it."""
    port = meeting_port()
    running: dict[int, int] = {}
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _process(config, rank, processes, port, point)
        running[pid] = rank
    ended: dict[int, int] = {}
    while running:
        pid, status = os.wait()
        ended[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
        if code != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return [ended[rank] for rank in range(processes)]


if __name__ == "__main__":
    run = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
    for each in sys.argv[3:]:
        _say(" ".join(map(str, [each, *_start(run, int(sys.argv[2]), each)])))
