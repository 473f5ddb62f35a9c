"""How many cores this process may use, and how many threads each of several processes should start.

A container often may use fewer cores than its machine has. torch counts the machine's, or those of the affinity, but
never the quota of the container's cgroup; with more threads than cores a step takes many times as long, because threads
wait for each other at every operation. What the user has chosen (OMP_NUM_THREADS, torch.set_num_threads) stays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_OURS = "LLAVA_NPU_SET_THREADS"  # set next to OMP_NUM_THREADS where llava-npu's launcher has chosen it
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Cores:
    """The host's cores.

    Attributes:
        machine: of the machine.
        usable: those that this process may use.
        busy: share of the time that other work keeps the cores of this process's affinity busy, 0 to 1.
    """

    machine: int
    usable: int
    busy: float


def usable_cores() -> int:
    """Cores that this process may keep busy: of its affinity, within its cgroup's quota; at least 1."""
    cores = len(affinity())
    limit = quota()
    return cores if limit is None else max(1, min(cores, int(limit)))


def affinity() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def quota(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float | None:
    """Cores' worth of time that this process's cgroup and those around it allow; None: no limit.

    Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us) of Linux.

    Args:
        root: where cgroups are mounted.
        own: says which this process is in, one line per hierarchy: "ID:CONTROLLERS:PATH"; version 2 has ID 0.
    """
    limits: list[float] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            for folder in _upward(root, path):
                limits += _limit_of_version_2(folder)
        elif "cpu" in controllers.split(","):
            for mount in {controllers, "cpu"}:
                for folder in _upward(root / mount, path):
                    limits += _limit_of_version_1(folder)
    return min(limits, default=None)


def _upward(root: Path, path: str) -> Iterator[Path]:
    """The folder of a cgroup and those around it; in a container, of the host's path only the root may exist."""
    folder = root / path.lstrip("/")
    while folder != root:
        yield folder
        folder = folder.parent
    yield root


def _limit_of_version_2(folder: Path) -> Iterator[float]:
    fields = _read(folder / "cpu.max").split()
    if len(fields) == 2 and fields[0] != "max":
        yield int(fields[0]) / int(fields[1])


def _limit_of_version_1(folder: Path) -> Iterator[float]:
    allowed, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if allowed and period and int(allowed) > 0:  # -1: no limit
        yield int(allowed) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def thread_variables(processes: int) -> dict[str, str]:
    """Environment variables for `processes` started here, which share the cores; none where they are set."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes)), _OURS: "1"}


def user_has_chosen() -> bool:
    """Whether OMP_NUM_THREADS is the user's."""
    return "OMP_NUM_THREADS" in os.environ and _OURS not in os.environ


def look(seconds: float = 0.3) -> Cores:
    """Counts cores, and for so long watches how busy other work keeps them."""
    mine = affinity()
    before = _times()
    time.sleep(seconds)
    after = _times()
    spent = [(after[core][0] - before[core][0], after[core][1] - before[core][1]) for core in mine if core in before]
    total = sum(each for _, each in spent)
    busy = sum(each for each, _ in spent) / total if total else 0.0
    return Cores(os.cpu_count() or 1, usable_cores(), busy)


def _times() -> dict[int, tuple[int, int]]:
    """Of each core, ticks spent working and in all. Columns 4 and 5 of /proc/stat are idle and waiting for disks."""
    times = {}
    for line in _read(_STAT).splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(field) for field in fields[:8]]
            times[int(name[3:])] = (sum(ticks) - ticks[3] - ticks[4], sum(ticks))
    return times
