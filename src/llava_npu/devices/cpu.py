"""CPUs: always there, and the reference that every other device is compared with."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
from pathlib import Path

import psutil
import torch

from llava_npu.devices.base import Device, Memory
from llava_npu.devices.peaks import measured_tflops
from llava_npu.devices.profiling import HostProfiler, Profiler
from llava_npu.distributed import cores


class CpuDevice(Device):
    kind = "cpu"
    distributed_backend = "gloo"

    def is_available(self) -> bool:
        return True

    def why_unavailable(self) -> str:
        return "a CPU is always available."

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def name(self) -> str:
        return _model_name()

    @property
    def count(self) -> int:
        return 1

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        # bfloat16 without matrix instructions for it is emulated, and many times slower than fp32.
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or _has_amx() else None

    @property
    def quantized_bits(self) -> tuple[int, ...]:
        return (4,)  # 8-bit products of bitsandbytes would round to float16 here

    def memory(self) -> Memory:
        system = psutil.virtual_memory()
        return Memory(total=system.total, free=system.available, peak=_peak_resident())

    def reset_peak_memory(self) -> None:
        # Linux forgets a process's peak when 5 is written here; elsewhere the peak is the whole process's.
        path = Path("/proc/self/clear_refs")
        if os.access(path, os.W_OK):
            path.write_text("5")

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        # glibc keeps freed blocks for later ones, and after a training run those are gigabytes.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def peak_tflops(self, dtype: torch.dtype) -> float:
        # Most CPUs emulate float16 products, hundreds of times slower than float32: no peak to compare a run with.
        dtype = torch.float32 if dtype is torch.float16 else dtype
        return measured_tflops(self.torch_device, dtype, self.synchronize)

    def profiler(self, folder: Path) -> Profiler:
        return HostProfiler(folder)


@functools.cache
def _model_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_threads_set: int | None = None  # by `share_host_threads`


def share_host_threads(workers: int = 0) -> None:
    """Has torch's operators on the host start as many threads as this process's share of the usable cores.

    Nothing changes where the user has set OMP_NUM_THREADS, or torch.set_num_threads to a number that torch does not
    start with by itself.

    Args:
        workers: processes of one thread that work for this one, such as a data loader's.
    """
    global _threads_set
    if cores.user_has_chosen():
        return
    given = os.environ.get("OMP_NUM_THREADS")  # by llava-npu's launcher
    share = int(given) if given else cores.usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    standard = {share, len(cores.affinity()), os.cpu_count(), psutil.cpu_count(logical=False), _threads_set}
    if torch.get_num_threads() in standard:
        _threads_set = max(1, share - workers)
        torch.set_num_threads(_threads_set)
