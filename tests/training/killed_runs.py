"""A run that is killed again and again, at points of its code, and started again each time.

    python killed_runs.py CONFIG.json NUM_PROCESSES POINT …

Imports once and forks for every start, which is what makes it cheap. At POINT, as `renamed` or `renamed@1` (in process
1), the process kills itself with SIGKILL, and the others of that start are killed too. Prints a line for each start.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_npu.config import RunConfig
from llava_npu.errors import UserError
from llava_npu.training import checkpoints, loop, saving, state
from llava_npu.training.launching import meeting_port


def _die(*arguments: Any, **options: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _then_die(function: Callable[..., Any], calls: int = 1) -> Callable[..., Any]:
    """Does what `function` does, `calls` times, and dies."""
    done = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        result = function(*arguments, **options)
        done += 1
        return _die() if done == calls else result

    return call


def _on_a_full_disk(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return function(*arguments, **options)

    return call


def _arm(point: str) -> None:
    """Puts the end of this process where `point` says."""
    if point == "backward":  # the second step's gradients are there, nothing is saved yet
        loop._accumulate = _then_die(loop._accumulate, calls=2)
    elif point == "weights":  # a part of a checkpoint is written
        state.write_tensors = _then_die(state.write_tensors)
    elif point == "manifest":  # all of it is, but it has no name yet
        checkpoints._sync = _die
    elif point == "renamed":  # it has a name, and the one that it replaces is there
        saving.prune = _die
    elif point == "pruning":  # half deleted
        checkpoints.shutil.rmtree = lambda path, **options: _die() if "checkpoint" in str(path) else None
    elif point == "full":
        saving.write_folder = _on_a_full_disk(saving.write_folder)
    elif point == "exporting":
        loop.export_whole = loop.export_adapters = _die
    elif point != "none":
        raise ValueError(point)


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
    point, _, at = point.partition("@")
    if int(at or 0) == rank:
        _arm(point)
    status = 0
    try:
        loop.train(config, console=Console(file=sys.stderr))
    except UserError as error:
        print("error:", str(error).partition(" (")[0], flush=True)
        status = 2
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
        print(each, *_start(run, int(sys.argv[2]), each), flush=True)
