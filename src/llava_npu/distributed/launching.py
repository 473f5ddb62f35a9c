"""`--devices N`: starts N processes on this machine, as torchrun does, and ends them as one.

`python -m llava_npu.distributed.launching N PROGRAM` does so for any Python program. The processes get torchrun's
environment variables, so that a run does not know who started it. Of what goes wrong in them one error is shown, once:
the first that a user can do something about.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from llava_npu.distributed.cores import thread_variables
from llava_npu.distributed.interruption import EXIT_STATUS
from llava_npu.distributed.launched import REPORTS, ExitReport, die_with_parent
from llava_npu.errors import UserError
from llava_npu.files.json_objects import read_json

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 1.0  # for other processes to report what made the first one fail
_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Outcome:
    """How a launch ended: the status to exit with, and what to say, if anything."""

    status: int
    message: str


def launch(arguments: Sequence[str], devices: int, program: Sequence[str] = ("-m", "llava_npu")) -> Outcome:
    """Runs `python PROGRAM ARGUMENTS` in `devices` processes, to the end of all of them.

    SIGTERM and SIGINT are passed on, a second one kills. If this process is killed, so are they.

    Raises:
        UserError: this process has itself been started by a launcher.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        raise UserError(
            "--devices starts processes of its own, but a launcher such as torchrun started this one (RANK and "
            "WORLD_SIZE are set). Leave --devices out there."
        )
    with tempfile.TemporaryDirectory(prefix="llava-npu-") as folder, _signals() as received:
        processes = _start([*program, *arguments], devices, Path(folder))
        try:
            while any(process.poll() is None for process in processes):
                _pass_on(received, processes)
                if any(process.poll() not in (None, 0, EXIT_STATUS) for process in processes):
                    time.sleep(_GRACE_SECONDS)
                    break
                time.sleep(_POLL_SECONDS)
            statuses = [process.poll() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return _outcome(statuses, Path(folder))


def _start(command: Sequence[str], devices: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(meeting_port()),
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        REPORTS: str(folder),
        **thread_variables(devices),
    }
    processes = []
    for rank in range(devices):
        with (folder / f"output-{rank}").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else output,
                    stderr=None if rank == 0 else output,
                    preexec_fn=partial(die_with_parent, os.getpid()),
                    start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
                )
            )
    return processes


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, in the order in which they come."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(received: list[int], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Hands new signals to all processes; each process takes its second one as the order to leave at once."""
    while received:
        number = received.pop(0)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)


def _outcome(statuses: Sequence[int | None], folder: Path) -> Outcome:
    """What to say, from how processes ended by themselves (None: they had to be killed) and from their reports.

    An error in one process makes others fail, in ways that tell less. A user's error comes first, then a process that
    was killed, then the earliest report.
    """
    reports = sorted((report for rank in range(len(statuses)) if (report := _read(folder, rank))), key=lambda r: r.time)
    for report in reports:
        if report.status == 2:
            return Outcome(report.status, report.message)
    for rank, status in enumerate(statuses):
        if status is not None and status < 0:
            return _unexplained(rank, status, folder)
    if reports:
        return Outcome(reports[0].status, reports[0].message)
    for rank, status in enumerate(statuses):
        if status:
            return _unexplained(rank, status, folder)
    return Outcome(0, "")


def _unexplained(rank: int, status: int, folder: Path) -> Outcome:
    """A process that ended without saying why."""
    output = (folder / f"output-{rank}").read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"left with status {status}"
    hint = " (the system does this when memory runs out)" if status == -signal.SIGKILL else ""
    shown = f"; its last output:\n{output}" if output else ""
    return Outcome(128 - status if status < 0 else status, f"process {rank} {how}{hint}{shown}")


def _read(folder: Path, rank: int) -> ExitReport | None:
    path = folder / f"report-{rank}.json"
    return ExitReport(**read_json(path)) if path.is_file() else None


def meeting_port() -> int:
    """A free port of this machine for processes to meet at.

    They take seconds to start, and any port that the system gives out itself (from 32768 on) may be given to another
    program meanwhile. So it is one below these, above those of HCCL (devices/npu.py), and drawn: two launches at once
    rarely try the same.
    """
    ports = range(24_576, 32_768)
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"no port from {ports.start} to {ports.stop - 1} is free for the processes to meet at")


def main() -> int:
    """Launches what the command line of this process says; what goes wrong is printed once, to stderr."""
    devices, *program = sys.argv[1:]
    outcome = launch([], int(devices), program)
    if outcome.message:
        print(outcome.message, file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
