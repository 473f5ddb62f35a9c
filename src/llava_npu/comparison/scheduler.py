"""Which device runs which trial, and when: one worker process a trial, one trial a device at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from llava_npu import devices
from llava_npu.comparison.folder import FAILURE, LOG, Failure, read_failure, write_failure
from llava_npu.comparison.grid import Trial
from llava_npu.distributed.cores import thread_variables
from llava_npu.distributed.launched import die_with_parent
from llava_npu.errors import UserError

WORKER = ("-m", "llava_npu.comparison.trial")
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 300  # for a worker that was told to stop: it saves its state first
_LONGEST_LINE = 160


@dataclass(frozen=True)
class Slot:
    """Where a trial can run.

    Attributes:
        device: as `devices.select` takes it; of several processes, each takes its own of that kind.
        processes: how many train the trial together.
        environment: what keeps them to their devices.
    """

    device: str
    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """What happened to a trial.

    Attributes:
        trial, slot: which, and where.
        kind: "started", "line" (it printed a line), "finished" or "failed".
        text: the line, or the reason.
        seconds: since its start.
    """

    trial: Trial
    slot: Slot
    kind: str
    text: str = ""
    seconds: float = 0.0


@dataclass
class _Worker:
    trial: Trial
    slot: Slot
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float
    last_line: str = ""


def all_devices(names: Sequence[str]) -> list[str]:
    """The devices that trials are spread over, in names that `devices.select` takes.

    `auto` stands for all devices of the best kind that this machine has, a kind alone for all of that kind.

    Raises:
        UserError: a device does not exist.
    """
    found: list[str] = []
    for name in names:
        kind, _, index = name.partition(":")
        if kind == "auto":
            kind = next(each for each in devices.kinds() if devices.of_kind(each).is_available())
        elif kind not in devices.kinds():
            devices.select(name)  # raises, and says what there is
        device = devices.of_kind(kind)
        if not device.is_available():
            raise UserError(f"device {name!r} is not available: {device.why_unavailable()}")
        if index and not (index.isdigit() and int(index) < device.count):
            raise UserError(f"device {name!r}: this machine has {device.count} of kind {kind}, counted from 0.")
        found += [name] if index or device.count == 1 else [f"{kind}:{number}" for number in range(device.count)]
    return found


def share_out(names: Sequence[str], per_trial: int) -> list[Slot]:
    """Groups devices, as `all_devices` names them, by the trials that they work on.

    Raises:
        UserError: there are too few of any kind.
    """
    if per_trial == 1:
        return [Slot(name) for name in names]
    by_kind: dict[str, list[int]] = defaultdict(list)
    slots = []
    for name in names:
        kind, _, index = name.partition(":")
        if devices.of_kind(kind).visibility_variable is None:  # a CPU: its processes share it
            slots.append(Slot(name, per_trial))
        else:
            by_kind[kind].append(int(index or 0))
    for kind, indices in by_kind.items():
        for start in range(0, len(indices) - per_trial + 1, per_trial):
            visible = devices.of_kind(kind).visible_only(indices[start : start + per_trial])
            slots.append(Slot(kind, per_trial, visible))
    if not slots:
        raise UserError(f"devices_per_trial: {per_trial}, but there are {len(names)} devices: {', '.join(names)}.")
    return slots


def run_trials(trials: Sequence[Trial], slots: Sequence[Slot], report: Callable[[Event], None]) -> None:
    """Runs every trial once; a failed one is recorded in its folder, and the others continue.

    Interrupted, it stops the workers; what they have done so far is kept, and another call resumes it.
    """
    waiting = deque(_encoders_first(trials))
    running: list[_Worker] = []
    free = list(slots)
    environment = _environment(sum(slot.processes for slot in slots))
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.popleft(), free.pop(0), environment))
                report(Event(running[-1].trial, running[-1].slot, "started"))
            time.sleep(_POLL_SECONDS)
            for worker in list(running):
                line = _last_line(worker.trial.folder / LOG)
                if line != worker.last_line:
                    worker.last_line = line
                    report(Event(worker.trial, worker.slot, "line", line, time.monotonic() - worker.started))
                if worker.process.poll() is not None:
                    running.remove(worker)
                    free.append(worker.slot)
                    report(_finish(worker))
    finally:
        _stop(running)


def _encoders_first(trials: Sequence[Trial]) -> list[Trial]:
    """One trial of each encoder before the second of any: devices side by side compute different features."""
    seen: Counter[str] = Counter()
    rounds = []
    for trial in trials:
        rounds.append((seen[trial.encoder], trial))
        seen[trial.encoder] += 1
    return [trial for _, trial in sorted(rounds, key=lambda pair: pair[0])]


def _start(trial: Trial, slot: Slot, environment: dict[str, str]) -> _Worker:
    (trial.folder / FAILURE).unlink(missing_ok=True)
    log = (trial.folder / LOG).open("ab")
    together = ["-m", "llava_npu.distributed.launching", str(slot.processes)]
    command = [sys.executable, *(together if slot.processes > 1 else []), *WORKER, str(trial.folder)]
    command += ["--device", slot.device]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**environment, **slot.environment},
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    return _Worker(trial, slot, process, log, time.monotonic())


def _environment(processes: int) -> dict[str, str]:
    """The workers' environment: where several share the host's cores, each takes its part of them."""
    return {**os.environ, **thread_variables(processes)}


def _finish(worker: _Worker) -> Event:
    worker.log.close()
    seconds, status = time.monotonic() - worker.started, worker.process.returncode
    if status == 0:
        return Event(worker.trial, worker.slot, "finished", seconds=seconds)
    failure = read_failure(worker.trial.folder)
    if failure is None:  # it died before it could say why
        killed = f"was ended by signal {-status}" if status < 0 else f"left with status {status}"
        memory = " (out of memory?)" if status == -9 else ""
        failure = Failure("failed", f"its process {killed}{memory}; see {worker.trial.folder / LOG}")
        write_failure(worker.trial.folder, failure)
    return Event(worker.trial, worker.slot, "failed", failure.reason, seconds)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        try:
            worker.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.log.close()


def _last_line(log: Path) -> str:
    """The last line that a worker printed."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip()[:_LONGEST_LINE] for line in reversed(lines) if line.strip()), "")
