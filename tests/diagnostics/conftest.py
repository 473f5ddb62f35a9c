"""A healthy machine with two Ascend devices, as facts, to be made ill by one change each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.diagnostics.compatibility import LIBRARIES
from llava_npu.diagnostics.machine import PACKAGES, Ascend, Chip, Disk, Machine
from llava_npu.diagnostics.trial import DeviceFacts, ProbeResult
from llava_npu.distributed.cores import Cores

GIB = 2**30


def _healthy() -> Machine:
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES, "1.0")
    versions |= {library.name: library.minimum for library in LIBRARIES}
    versions |= {"torch": "2.9.0+cpu", "torch-npu": "2.9.0.post6", "bitsandbytes": None}
    npu = DeviceFacts("npu:0", "Ascend910B3", 64 * GIB, 63 * GIB, bfloat16=True, accelerator=True)
    return Machine(
        python="3.11.9",
        system="Linux 5.10 aarch64",
        versions=versions,
        environment={},
        ascend=Ascend(
            cann="9.1.0",
            cann_folder=Path("/usr/local/Ascend/cann"),
            sourced=True,
            driver="25.5.2",
            nodes=("/dev/davinci0", "/dev/davinci1"),
            chips=(Chip(0, "910B3", "OK"), Chip(1, "910B3", "OK")),
        ),
        disks=(Disk("run folder", Path("/data"), 500 * GIB),),
        taken_ports=(),
        cores=Cores(machine=192, usable=24, busy=0.02),
        trial=ProbeResult(
            torch="2.9.0+cpu", devices=(npu, dataclasses.replace(npu, device="npu:1")), start_method="fork"
        ),
    )


@pytest.fixture
def machine() -> Callable[..., Machine]:
    """Builds the machine; arguments replace facts, those for `versions`, `environment`, `ascend`, `trial` in part."""

    def make(**changes: Any) -> Machine:
        healthy = _healthy()
        for name in ("versions", "environment"):
            changes[name] = {**getattr(healthy, name), **changes.get(name, {})}
        for name in ("ascend", "trial"):
            changes[name] = dataclasses.replace(getattr(healthy, name), **changes.get(name, {}))
        return dataclasses.replace(healthy, **changes)

    return make
