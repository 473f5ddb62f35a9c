"""Devices that can be used now, their memory, and disks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llava_npu.diagnostics.checks.ascend import fix_for
from llava_npu.diagnostics.findings import Finding, error, ok, warning
from llava_npu.diagnostics.machine import Machine

GIB = 2**30
_BUSY = 0.5


def devices(machine: Machine) -> Iterator[Finding]:
    trial = machine.trial
    for device in trial.devices:
        free, total = device.memory_free / GIB, device.memory_total / GIB
        what = f"{device.name}, {free:.1f} of {total:.1f} GiB free" + (", bfloat16" if device.bfloat16 else "")
        if device.accelerator and free < 0.8 * total:
            yield warning(
                device.device,
                what,
                "Another process holds memory of this device; training may run out of it.",
                "Find it with npu-smi info or nvidia-smi, or choose another device: --device "
                + re.sub(r"\d+$", "N", device.device),
            )
        else:
            yield ok(device.device, what)
    for kind, reason in trial.broken.items():
        yield error(
            f"{kind} devices",
            reason,
            "Its software is installed, but no device of this kind can be used.",
            fix_for(machine),
        )
    for problem in trial.warnings:
        what, _, fix = problem.partition(": ")
        yield warning("process", what, "It acts in every Python process of this environment.", fix)


def cores(machine: Machine) -> Iterator[Finding]:
    found, threads = machine.cores, machine.environment.get("OMP_NUM_THREADS", "")
    shown = f"{found.usable} of {found.machine} may be used"
    if found.busy >= _BUSY:
        yield warning(
            "cores",
            f"{shown}, and other work keeps them {found.busy:.0%} busy",
            "Threads wait for each other at every operation: with others on their cores, a step on the CPU takes many "
            "times as long, and workers that prepare images fall behind.",
            "See who it is with top; wait, or choose free cores with taskset -c",
        )
    elif threads.isdigit() and int(threads) > found.usable:
        yield warning(
            "cores",
            f"{shown}, but OMP_NUM_THREADS={threads}",
            "Threads beyond the cores (of the affinity, within the container's quota) wait for each other.",
            f"unset OMP_NUM_THREADS (llava-npu chooses {found.usable}, shared among processes and workers)",
        )
    else:
        yield ok("cores", shown)


def disk(machine: Machine) -> Iterator[Finding]:
    for place in machine.disks:
        free = place.free / GIB
        what = f"{free:.1f} GiB free for {place.purpose} ({place.path})"
        if place.purpose == "shared memory":
            if free < 1:
                yield warning(
                    "disk",
                    what,
                    "Worker processes hand batches over through it: they die with a bus error when it is full.",
                    "docker run --shm-size=16g …, or data.workers=0",
                )
            continue
        if free < 1:
            yield error("disk", what, "Nothing can be written there.", f"Free some space under {place.path}")
        elif free < 30 and place.purpose == "run folder":
            yield warning(
                "disk",
                what,
                "A 7B model with optimizer state takes about 100 GiB per checkpoint, a trained projector under 1 GiB.",
                "Set output to a folder on a larger disk",
            )
        else:
            yield ok("disk", what)
