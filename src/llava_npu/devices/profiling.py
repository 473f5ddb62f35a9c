"""What a device and its host did over a stretch of time, from torch's profiler or the device's own."""

from __future__ import annotations

import csv
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

Kind = Literal["matrix", "vector", "attention", "communication", "waiting", "range"]

# Operators of the host that compute nothing themselves: views, allocations, and those that call others for the work.
_NO_WORK = re.compile(
    r"aten::(view|_unsafe_view|_reshape_alias|reshape|t|transpose|permute|as_strided|expand|expand_as|detach|alias"
    r"|select|slice|narrow|unsqueeze|squeeze|unbind|split\w*|chunk|flatten|unflatten|empty\w*|new_empty\w*|resize_|set_"
    r"|result_type|lift_fresh|to|_to_copy|contiguous|clone|linear|matmul|item|_local_scalar_dense|is_nonzero)_?"
)
_ATTENTION = re.compile(r"attention|flash|fmha|sdpa", re.IGNORECASE)
_COMMUNICATION = re.compile(r"^(c10d|gloo|nccl|hccl)|nccl|hcom_", re.IGNORECASE)
_MATRIX_OPERATOR = re.compile(r"aten::(_?(add|add_)?(b?mm|mv)_?|baddbmm_?|addbmm_?|dot|.*conv.*)(\.out)?$")
_MATRIX_KERNEL = re.compile(r"gemm|gemv|cutlass|cublas|xmma|wgmma|nvjet|convolve|conv2d|winograd|splitk", re.IGNORECASE)


@dataclass(frozen=True)
class ProfiledOperation:
    """Something that took time, from `start` to `end`.

    Attributes:
        kind: of work that the device did; "waiting": the host waited for the device; "range": a named stretch of the
            host's time (`torch.profiler.record_function`).
        start, end: nanoseconds of the profiler's clock.
    """

    name: str
    kind: Kind
    start: int
    end: int


class Profiler(ABC):
    """Watches this process and its device between `start` and `stop`.

    Attributes:
        host_computes: whether the device's work is done by the host itself.
    """

    host_computes: ClassVar[bool] = False

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None:
        """Stops watching, and writes the trace."""

    @abstractmethod
    def operations(self) -> list[ProfiledOperation]:
        """What was seen, once `stop` has been called."""


class TorchProfiler(Profiler):
    """torch's own profiler, of the host and what else `activities` names. Writes `trace.json` (chrome://tracing)."""

    def __init__(self, folder: Path, activities: Sequence[torch.profiler.ProfilerActivity]) -> None:
        self._file = folder / "trace.json"
        self._profiler = torch.profiler.profile(activities=list(activities))

    def start(self) -> None:
        self._profiler.start()

    def stop(self) -> None:
        self._profiler.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._file))

    def operations(self) -> list[ProfiledOperation]:
        found = (self._operation(event) for event in trace_events(self._file))
        return [each for each in found if each is not None]

    def _operation(self, event: dict[str, Any]) -> ProfiledOperation | None:
        kind = self._kind(event["name"], event.get("cat", ""))
        return None if kind is None else operation(event, kind)

    def _kind(self, name: str, category: str) -> Kind | None:
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            return kernel_kind(name)
        if category.endswith(("_runtime", "_driver")):
            return "waiting" if "Synchronize" in name else None
        if _COMMUNICATION.search(name):
            return "communication"
        return "range" if category == "user_annotation" else None


class HostProfiler(TorchProfiler):
    """Of a CPU, where operators are the work."""

    host_computes = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, [torch.profiler.ProfilerActivity.CPU])

    def _kind(self, name: str, category: str) -> Kind | None:
        return operator_kind(name) or super()._kind(name, category)


class AscendProfiler(Profiler):
    """torch_npu's profiler. Writes the folder `*_ascend_pt`, which MindStudio Insight opens.

    Its `kernel_details.csv` lists what the NPU did, with the core that did it, and `trace_view.json` the host's time.

    Args:
        module: `torch_npu.profiler`.
    """

    def __init__(self, folder: Path, module: Any) -> None:
        self._folder = folder
        if folder.exists():  # of an earlier start: this one's would lie next to it under another name
            shutil.rmtree(folder)
        self._profiler = module.profile(
            activities=[module.ProfilerActivity.CPU, module.ProfilerActivity.NPU],
            on_trace_ready=module.tensorboard_trace_handler(str(folder)),
            # From this level on the table says which core ran a kernel.
            experimental_config=module._ExperimentalConfig(profiler_level=module.ProfilerLevel.Level1),
        )

    def start(self) -> None:
        self._profiler.start()

    def stop(self) -> None:
        self._profiler.stop()

    def operations(self) -> list[ProfiledOperation]:
        found: list[ProfiledOperation] = []
        for output in self._folder.glob("*_ascend_pt/ASCEND_PROFILER_OUTPUT"):
            if (table := output / "kernel_details.csv").is_file():
                found += _kernels(table)
            if (trace := output / "trace_view.json").is_file():
                found += [operation(each, kind) for each in trace_events(trace) if (kind := _host_kind(each["name"]))]
        return found


def _kernels(table: Path) -> Iterator[ProfiledOperation]:
    with table.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            start, duration = (_nanoseconds(row[name]) for name in ("Start Time(us)", "Duration(us)"))
            kind = ascend_kind(row.get("Type") or row["Name"], row.get("Accelerator Core") or "")
            yield ProfiledOperation(row["Name"], kind, start, start + duration)


def _host_kind(name: str) -> Kind | None:
    if name.startswith("llava_npu: "):  # this file has no categories to tell ranges by
        return "range"
    if _COMMUNICATION.search(name) and "::" in name:
        return "communication"
    return "waiting" if "Synchronize" in name else None


def trace_events(file: Path) -> list[dict[str, Any]]:
    """Everything with a duration in a trace in Chrome's format."""
    content = json.loads(file.read_text(encoding="utf-8"))
    events = content["traceEvents"] if isinstance(content, dict) else content
    return [event for event in events if event.get("ph") == "X"]


def operation(event: dict[str, Any], kind: Kind) -> ProfiledOperation:
    """An event of such a trace."""
    start = _nanoseconds(event["ts"])
    return ProfiledOperation(event["name"], kind, start, start + _nanoseconds(event["dur"]))


def _nanoseconds(microseconds: str | float) -> int:
    """Exactly: since 1970 there have been more of them than a float can count."""
    return int(Decimal(str(microseconds).strip()) * 1000)


def operator_kind(name: str) -> Kind | None:
    """Of an operator of the host by its name; None: no work of its own."""
    space = name.partition("::")[0]
    if "::" not in name or " " in space or space in ("c10d", "autograd") or _NO_WORK.fullmatch(name):
        return None
    if _ATTENTION.search(name):
        return "attention"
    return "matrix" if _MATRIX_OPERATOR.fullmatch(name) else "vector"


def kernel_kind(name: str) -> Kind:
    """Of a GPU's kernel by its name."""
    if _COMMUNICATION.search(name):
        return "communication"
    if _ATTENTION.search(name):
        return "attention"
    return "matrix" if _MATRIX_KERNEL.search(name) else "vector"


def ascend_kind(operator: str, core: str) -> Kind:
    """Of an NPU's kernel by its type and the core that ran it."""
    if _COMMUNICATION.search(operator) or core in ("HCCL", "COMMUNICATION"):
        return "communication"
    if "Attention" in operator:
        return "attention"
    return "matrix" if core in ("AI_CORE", "MIX_AIC") else "vector"  # the cube's cores, or the vector units and AI CPUs
