"""One of the processes that `llava-npu train --devices N` starts: runs the command, and reports how it ended.

Instead of printing an error, which all of them would do at once, it leaves a report for the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_npu.distributed.interruption import EXIT_STATUS, RunStopped
from llava_npu.errors import UserError

REPORTS = "LLAVA_NPU_REPORTS"  # the folder for reports
_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


@dataclass(frozen=True)
class Report:
    """Why a process ended: its exit status, what to tell the user, and when."""

    status: int
    message: str
    time: float


def main() -> None:
    """Runs the command line of this process."""
    _die_with_launcher()
    from llava_npu.cli import app, set_environment

    set_environment()
    try:
        app()
    except UserError as error:
        _leave(2, f"error: {error}")
    except RunStopped as stopped:
        _leave(EXIT_STATUS, str(stopped))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except Exception:  # noqa: BLE001  shown by the launcher
        _leave(1, f"process {os.environ['RANK']} failed:\n{traceback.format_exc()}")


def _leave(status: int, message: str) -> None:
    path = Path(os.environ[REPORTS]) / f"report-{os.environ['RANK']}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(Report(status, message, time.time()))), encoding="utf-8")
    partial.rename(path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an ordinary exit may wait for processes that have failed, or for threads that wait for them


def _die_with_launcher() -> None:
    """On Linux: when the launcher is killed, so is this process, rather than train on with nobody watching."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    main()
