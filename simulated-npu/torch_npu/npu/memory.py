"""Memory figures. Nothing is cached: reserved memory is allocated memory."""

from __future__ import annotations

from torch_npu import _C
from torch_npu.npu.utils import DeviceLike, device_index


def memory_allocated(device: DeviceLike = None) -> int:
    return _C.memory_statistics(device_index(device)).allocated


def max_memory_allocated(device: DeviceLike = None) -> int:
    return _C.memory_statistics(device_index(device)).peak


def memory_reserved(device: DeviceLike = None) -> int:
    return memory_allocated(device)


def max_memory_reserved(device: DeviceLike = None) -> int:
    return max_memory_allocated(device)


def reset_peak_memory_stats(device: DeviceLike = None) -> None:
    _C.reset_peak_memory(device_index(device))


def reset_max_memory_allocated(device: DeviceLike = None) -> None:
    reset_peak_memory_stats(device)


def mem_get_info(device: DeviceLike = None) -> tuple[int, int]:
    """Free and total bytes."""
    now = _C.memory_statistics(device_index(device))
    return now.limit - now.allocated, now.limit


def memory_stats(device: DeviceLike = None) -> dict[str, int]:
    now = _C.memory_statistics(device_index(device))
    statistics = {"num_alloc_retries": 0, "num_ooms": now.out_of_memory_count}
    for kind in ("active_bytes", "allocated_bytes", "reserved_bytes"):
        statistics[f"{kind}.all.current"] = now.allocated
        statistics[f"{kind}.all.peak"] = now.peak
    return statistics


def empty_cache() -> None:
    """Nothing to do."""
