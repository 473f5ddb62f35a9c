"""A process that `launching` started: reports how it ended, and does not outlive its parent.

Instead of printing an error, which all of them would do at once, it leaves a report for the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from llava_npu.distributed.interruption import EXIT_STATUS, RunStopped
from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text

REPORTS = "LLAVA_NPU_REPORTS"  # the folder for reports
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed reads
_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def rank() -> int:
    """This process's number in its launch, also before the processes are joined.

    Raises:
        UserError: the launcher's variables are incomplete; see `check_launcher`.
    """
    check_launcher()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of this launch, also before the processes are joined.

    Raises:
        UserError: the launcher's variables are incomplete; see `check_launcher`.
    """
    check_launcher()
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher() -> None:
    """Raises `UserError` where a launcher's environment variables are there in part only, or contradict each other.

    With half of them some libraries would join other processes, and wait for them, while others work alone.
    """
    found = {name: os.environ[name] for name in _LAUNCHERS if name in os.environ}
    numbers = {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in found}
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    if "LOCAL_RANK" not in numbers and all(value == alone[name] for name, value in numbers.items()):
        return  # none, or what some clusters set for a single process too
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    advice = "Start the processes with `--devices N` or torchrun, which set all of them, or unset them"
    if missing := [name for name in _LAUNCHERS if name not in found]:
        raise UserError(f"environment: {shown} is set, as by a launcher, but not {', '.join(missing)}. {advice}.")
    strange = [name for name in (*numbers, "MASTER_PORT") if not found[name].isdigit()]
    if strange:
        raise UserError(f"environment: {strange[0]}={found[strange[0]]!r} is not a whole number. {advice}.")
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise UserError(
            f"environment: RANK={numbers['RANK']} is not one of WORLD_SIZE={numbers['WORLD_SIZE']} processes, which "
            f"are counted from 0. {advice}."
        )


def local_world_size() -> int:
    """The number of this launch's processes on this machine, also before the processes are joined."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class PeerLostError(RuntimeError):
    """Another process of the launch is gone. Why, that process or its launcher says."""


@dataclass(frozen=True)
class ExitReport:
    """Why a process ended: its exit status, what to tell the user, and when."""

    status: int
    message: str
    time: float


def reporting(command: Callable[[], None]) -> None:
    """Runs the command line of this process; what goes wrong is reported to the launcher, not printed."""
    try:
        command()
    except UserError as error:
        _leave(2, f"error: {error}")
    except RunStopped as stopped:
        _leave(EXIT_STATUS, str(stopped))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except PeerLostError as error:
        _leave(1, f"error: {error}")
    except Exception:  # noqa: BLE001  shown by the launcher
        _leave(1, f"process {os.environ['RANK']} failed:\n{traceback.format_exc()}")


def _leave(status: int, message: str) -> NoReturn:
    report = ExitReport(status, message, time.time())
    write_text(Path(os.environ[REPORTS]) / f"report-{os.environ['RANK']}.json", json.dumps(asdict(report)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an ordinary exit may wait for processes that have failed, or for threads that wait for them


def die_with_parent(parent: int) -> None:
    """On Linux: when the process `parent`, which started this one, is killed, so is this one.

    To be called before `exec` (as `preexec_fn`) or at the start of a worker: a parent that is gone already counts.
    """
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def worker_dies_with_parent() -> None:
    """`die_with_parent` for a worker that `multiprocessing` spawned: the process that it works for is its parent."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with_parent(parent.pid)
