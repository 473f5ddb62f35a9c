"""NVIDIA GPUs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from llava_npu.devices.base import Device, Memory
from llava_npu.devices.marks import Mark, QueueMark
from llava_npu.devices.peaks import measured_tflops, published_tflops
from llava_npu.devices.profiling import Profiler, TorchProfiler


class CudaDevice(Device):
    kind = "cuda"
    distributed_backend = "nccl"
    visibility_variable = "CUDA_VISIBLE_DEVICES"

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def why_unavailable(self) -> str:
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) was built without CUDA; install a CUDA build of it."
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; check the driver with nvidia-smi."

    def use(self, index: int) -> None:
        super().use(index)
        torch.cuda.set_device(index)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.index)

    @property
    def count(self) -> int:
        return torch.cuda.device_count()

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    @property
    def quantized_bits(self) -> tuple[int, ...]:
        return (4, 8)

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.index)
        return Memory(total=total, free=free, peak=torch.cuda.max_memory_allocated(self.index))

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.index)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.index)

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, self.index)

    def peak_tflops(self, dtype: torch.dtype) -> float:
        return published_tflops(self.name, dtype) or measured_tflops(self.torch_device, dtype, self.synchronize)

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(torch.cuda.Stream(self.index))

    def mark(self) -> Mark:
        return QueueMark(torch.cuda.Event(enable_timing=True))

    def profiler(self, folder: Path) -> Profiler:
        return TorchProfiler(folder, [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])

    def use_exact_float32(self) -> list[str]:
        # Matrix products are exact unless someone chose otherwise; convolutions (a tower's patches) are not.
        if "NVIDIA_TF32_OVERRIDE" in os.environ or not torch.backends.cudnn.allow_tf32:
            return []
        torch.backends.cudnn.allow_tf32 = False
        return ["torch.backends.cudnn.allow_tf32=False"]
