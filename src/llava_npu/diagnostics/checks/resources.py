"""Devices that can be used now, their memory, and disks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llava_npu.diagnostics.checks.ascend import fix_for
from llava_npu.diagnostics.findings import Finding, error, ok, warning
from llava_npu.diagnostics.machine import Machine

GIB = 2**30


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
