"""Huawei Ascend NPUs, through torch_npu (Ascend Extension for PyTorch).

torch_npu is imported when an NPU is looked for, never before: it needs CANN's libraries, and an import that fails must
not take the CPU and CUDA paths with it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import torch

from llava_npu import ascend_chips
from llava_npu.devices.base import Device, Memory, Variable
from llava_npu.devices.marks import Mark, QueueMark
from llava_npu.devices.peaks import measured_tflops, published_tflops
from llava_npu.devices.profiling import AscendProfiler, Profiler
from llava_npu.errors import UserError
from llava_npu.ops.torch_npu_failure import describe_failure

_GLOBAL_HOOK = "torch_npu.contrib.transfer_to_npu"
_HCCL_PORTS = 32  # HCCL takes 16 or 32 ports from its base port on, by release


class NpuDevice(Device):
    kind = "npu"
    distributed_backend = "hccl"
    visibility_variable = "ASCEND_RT_VISIBLE_DEVICES"
    optimizer_heeds_found_inf = False  # op-plugin's FusedAdamWKernelNpuOpApi.cpp, branches 7.2.0 to master

    def is_available(self) -> bool:
        module, _ = _torch_npu()
        return module is not None and module.npu.is_available() and module.npu.device_count() > 0

    def why_unavailable(self) -> str:
        module, reason = _torch_npu()
        if module is None:
            return reason
        return f"torch_npu {module.__version__} finds no NPU; check the driver with npu-smi info."

    def has_software(self) -> bool:
        return importlib.util.find_spec("torch_npu") is not None

    @property
    def simulated(self) -> bool:
        return "simulated" in self._torch_npu.__version__

    def use(self, index: int) -> None:
        super().use(index)
        self._npu.set_device(index)
        if problem := ascend_chips.refusal(self.name):
            raise UserError(
                f"device 'npu:{index}': {problem} Use an Atlas A2 (Ascend 910B1 to 910B4) or A3, or --device cpu."
            )
        # Compiling every operator for every new shape takes minutes at the start; the binary kernels need no compiler.
        self._npu.set_compile_mode(jit_compile=False)

    @property
    def name(self) -> str:
        name = self._npu.get_device_name(self.index)
        return f"{name} (simulated)" if self.simulated and "simulated" not in name else name

    @property
    def count(self) -> int:
        return self._npu.device_count() if self.is_available() else 0

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self._npu.is_bf16_supported() else torch.float16

    @property
    def quantized_bits(self) -> tuple[int, ...]:
        # PyPI's bitsandbytes has no library for Ascends; what its Ascend branch builds lies where it is installed.
        package = importlib.util.find_spec("bitsandbytes")
        folders = [Path(each) for each in package.submodule_search_locations or ()] if package else []
        return (4,) if any(file for folder in folders for file in folder.glob("libbitsandbytes_npu*")) else ()

    @property
    def quantization_hint(self) -> str:
        return (
            "PyPI's bitsandbytes has no operators for Ascends. Others compile its Ascend branch (cmake "
            "-DCOMPUTE_BACKEND=npu; bitsandbytes pull requests 1422 and 1695), which has 4 bits: docs/npu.md."
        )

    def memory(self) -> Memory:
        free, total = self._npu.mem_get_info(self.index)
        return Memory(total=total, free=free, peak=self._npu.max_memory_allocated(self.index))

    def reset_peak_memory(self) -> None:
        self._npu.reset_peak_memory_stats(self.index)

    def synchronize(self) -> None:
        self._npu.synchronize(self.index)

    def empty_cache(self) -> None:
        self._npu.empty_cache()

    def rng_state(self) -> torch.Tensor:
        return self._npu.get_rng_state(self.index)

    def set_rng_state(self, state: torch.Tensor) -> None:
        self._npu.set_rng_state(state, self.index)

    def peak_tflops(self, dtype: torch.dtype) -> float:
        # Which name has how many cores rests on reports; the device's own count, where it tells it, is right.
        cores = getattr(self._npu.get_device_properties(self.index), "cube_core_num", None)
        published = None if self.simulated else published_tflops(self.name, dtype, cores)
        return published or measured_tflops(self.torch_device, dtype, self.synchronize)

    @property
    def compiles(self) -> bool:
        return False  # that takes torchair, which this project has not been tried with

    def stream(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._npu.stream(self._npu.Stream(self.index))
        return context

    def mark(self) -> Mark:
        return QueueMark(self._npu.Event(enable_timing=True))

    def profiler(self, folder: Path) -> Profiler:
        return AscendProfiler(folder, self._torch_npu.profiler)

    def environment(self) -> list[Variable]:
        variables = [
            Variable(
                "HCCL_CONNECT_TIMEOUT",
                "1200",
                "the default of 120 s is short where processes read or build caches at different speeds",
            )
        ]
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # from TorchNPU 26.2 on, both together end the process
            reason = "memory grows in place instead of breaking into pieces"
            variables.insert(0, Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", reason))
        master_port = os.environ.get("MASTER_PORT", "")
        if master_port.isdigit():  # a launch of several processes
            base = str(_hccl_base_port(int(master_port)))
            variables.append(Variable("HCCL_IF_BASE_PORT", base, "two jobs on one machine must not share ports"))
        return variables

    def use_exact_float32(self) -> list[str]:
        # Matrix products are exact unless someone chose otherwise; convolutions (a tower's patches) are not.
        if not self._npu.conv.allow_hf32:
            return []
        self._npu.conv.allow_hf32 = False
        return ["torch.npu.conv.allow_hf32=False"]

    def warnings(self) -> list[str]:
        if _GLOBAL_HOOK not in sys.modules:
            return []
        return [
            f"{_GLOBAL_HOOK} is active: it rewrites torch for the whole process and slows every step. llava-npu needs "
            "no such hook: remove its import (look in sitecustomize.py, *.pth files and your own scripts)."
        ]

    @property
    def _torch_npu(self) -> ModuleType:
        module, reason = _torch_npu()
        if module is None:
            raise RuntimeError(reason)
        return module

    @property
    def _npu(self) -> ModuleType:
        return self._torch_npu.npu


def _hccl_base_port(master_port: int) -> int:
    """HCCL's first port, from torch's rendezvous port: equal in all processes of a job and, but for one chance in 500,
    different between jobs. It lies below the ports that Linux gives to outgoing connections, from 32768 on.
    """
    return 16384 + master_port % 500 * _HCCL_PORTS


@functools.cache
def _torch_npu() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason in one sentence."""
    if importlib.util.find_spec("torch_npu") is None:
        return None, "torch_npu is not installed; install the release that matches your torch and CANN versions."
    try:
        module = importlib.import_module("torch_npu")
        module.npu  # noqa: B018  a folder that an uninstallation left has none
        return module, ""
    except Exception as error:  # noqa: BLE001  a broken driver or CANN raises whatever it likes; it is reported
        return None, describe_failure(error)
