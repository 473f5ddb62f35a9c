"""Huawei Ascend NPUs, through torch_npu (Ascend Extension for PyTorch).

torch_npu is imported when an NPU is looked for, never before: it needs CANN's libraries, and an import that fails must
not take the CPU and CUDA paths with it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from llava_npu.devices.base import Device, Memory
from llava_npu.devices.peaks import measured_tflops, published_tflops


class NpuDevice(Device):
    kind = "npu"
    distributed_backend = "hccl"

    def is_available(self) -> bool:
        module, _ = _torch_npu()
        return module is not None and module.npu.is_available() and module.npu.device_count() > 0

    def why_unavailable(self) -> str:
        module, reason = _torch_npu()
        if module is None:
            return reason
        return f"torch_npu {module.__version__} finds no NPU; check the driver with npu-smi info."

    @property
    def simulated(self) -> bool:
        """Whether this is the simulated NPU of the tests, whose speed and numerics say nothing of hardware."""
        return "simulated" in self._torch_npu.__version__

    def use(self, index: int) -> None:
        super().use(index)
        self._npu.set_device(index)
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
        published = None if self.simulated else published_tflops(self.name, dtype)
        return published or measured_tflops(self.torch_device, dtype, self.synchronize)

    def environment(self) -> dict[str, str]:
        return {
            # Grows segments instead of fragmenting; excludes max_split_size_mb.
            "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
            # The default of 120 s is short when ranks build caches or read from slow disks at different speeds.
            "HCCL_CONNECT_TIMEOUT": "1200",
            "HCCL_EXEC_TIMEOUT": "1800",
            # Two jobs on one machine collide on the default port range (error EJ0003).
            "HCCL_IF_BASE_PORT": "60000",
        }

    @property
    def _torch_npu(self) -> ModuleType:
        module, reason = _torch_npu()
        if module is None:
            raise RuntimeError(reason)
        return module

    @property
    def _npu(self) -> ModuleType:
        return self._torch_npu.npu


@functools.cache
def _torch_npu() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason in one sentence."""
    if importlib.util.find_spec("torch_npu") is None:
        return None, "torch_npu is not installed; install the release that matches your torch and CANN versions."
    try:
        return importlib.import_module("torch_npu"), ""
    except Exception as error:  # noqa: BLE001  a broken driver or CANN raises whatever it likes; it is reported
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, (
            f"torch_npu is installed but cannot be imported ({reason}); source CANN's set_env.sh and check that the "
            "torch_npu, torch and CANN versions belong together."
        )
