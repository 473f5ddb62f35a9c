"""`torch_npu.profiler`, as far as programs use it: torch's own profiler, its results in files of the real one's form.

What the simulated device does, its host does: each fused operator, matrix product, and innermost one is a kernel here.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch

_CUBE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution", "addmv", "mv", "dot")
_HEADER = ("Step Id", "Device_id", "Name", "Type", "OP State", "Accelerator Core", "Start Time(us)", "Duration(us)")


class ProfilerActivity(Enum):
    CPU = "CPU"
    NPU = "NPU"


class ProfilerLevel:
    Level_none = "Level_none"
    Level0 = "Level0"
    Level1 = "Level1"
    Level2 = "Level2"


class _ExperimentalConfig:
    def __init__(self, profiler_level: str = ProfilerLevel.Level0, **unused: Any) -> None:
        self.profiler_level = profiler_level


def tensorboard_trace_handler(
    dir_name: str, worker_name: str | None = None, analyse_flag: bool = True, async_mode: bool = False
) -> Callable[[profile], None]:
    """Writes `{worker}_{time}_ascend_pt/ASCEND_PROFILER_OUTPUT` into a folder."""

    def handle(profiler: profile) -> None:
        name = f"{worker_name or f'simulated_{os.getpid()}'}_{time.strftime('%Y%m%d%H%M%S')}_ascend_pt"
        folder = Path(dir_name) / name / "ASCEND_PROFILER_OUTPUT"
        folder.mkdir(parents=True)
        profiler.write(folder)

    return handle


class profile:  # noqa: N801  its real name
    def __init__(
        self,
        *,
        activities: Iterable[ProfilerActivity] | None = None,
        schedule: Any = None,
        on_trace_ready: Callable[[profile], None] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_modules: bool = False,
        with_flops: bool = False,
        experimental_config: _ExperimentalConfig | None = None,
    ) -> None:
        self._handler = on_trace_ready
        self._level = (experimental_config or _ExperimentalConfig()).profiler_level
        self._inner = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def start(self) -> None:
        self._inner.start()

    def stop(self) -> None:
        self._inner.stop()
        if self._handler is not None:
            self._handler(self)

    def write(self, folder: Path) -> None:
        """kernel_details.csv and trace_view.json; times are strings in the one, with a tab behind in the other."""
        whole = folder / "whole.json"
        self._inner.export_chrome_trace(str(whole))
        events = [each for each in json.loads(whole.read_text())["traceEvents"] if each.get("ph") == "X"]
        whole.unlink()
        (folder / "trace_view.json").write_text(
            json.dumps([{**each, "ts": str(each["ts"])} for each in events if isinstance(each["ts"], (int, float))])
        )
        with (folder / "kernel_details.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, _HEADER)
            table.writeheader()
            for each in _kernels([event for event in events if event.get("cat") == "cpu_op"]):
                operator = each["name"].rpartition("::")[2]
                core = "AI_CORE" if operator in _CUBE else "AI_VECTOR_CORE"
                row = {"Device_id": 0, "Name": operator, "OP State": "dynamic"}
                row |= {"Start Time(us)": f"{each['ts']}\t", "Duration(us)": each["dur"]}
                if self._level in (ProfilerLevel.Level1, ProfilerLevel.Level2):
                    kind = "FlashAttentionScore" if "attention" in operator else operator
                    row |= {"Type": kind, "Accelerator Core": "MIX_AIC" if "attention" in operator else core}
                table.writerow(row)


def _kernels(operators: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ordered = sorted(operators, key=lambda each: (each["tid"], each["ts"], -each["dur"]))
    following = [*ordered[1:], None]
    return [
        each
        for each, after in zip(ordered, following, strict=True)
        if each["name"].startswith("npu::")
        or each["name"].rpartition("::")[2] in _CUBE
        or after is None
        or after["tid"] != each["tid"]
        or after["ts"] >= each["ts"] + each["dur"]
    ]
