"""What only the simulated device has: settings, counters, a record of fused calls, and the tripwire for CUDA calls.

Environment variables, read when torch_npu is imported, so that they reach every process of a run:

    SIMULATED_NPU_COUNT       devices, 1 to 16 (default 1)
    SIMULATED_NPU_MEMORY      memory of each device: bytes, or a number with KiB, MiB or GiB (default 64GiB)
    SIMULATED_NPU_RECORD_DIR  folder to which every process writes the fused calls it makes
    SIMULATED_NPU_TRIPWIRE    source folder of the product: CUDA calls made from its files raise
    SIMULATED_NPU_BUILD_DIR   where the compiled backend is kept
"""

from __future__ import annotations

import os
from pathlib import Path

from torch_npu.npu.allocator import settings as allocator_settings
from torch_npu.simulation import recording, tripwire
from torch_npu.simulation.counters import HostSyncs, count_copied_bytes, count_host_syncs, op_counts
from torch_npu.simulation.memory import memory_limit, parse_bytes, set_memory_limit

__all__ = [
    "HostSyncs",
    "allocator_settings",
    "count_copied_bytes",
    "count_host_syncs",
    "memory_limit",
    "op_counts",
    "parse_bytes",
    "recording",
    "set_memory_limit",
    "start_from_environment",
    "tripwire",
]


def start_from_environment() -> None:
    if memory := os.environ.get("SIMULATED_NPU_MEMORY"):
        set_memory_limit(parse_bytes(memory))
    if folder := os.environ.get("SIMULATED_NPU_RECORD_DIR"):
        recording.start(Path(folder))
    if product := os.environ.get("SIMULATED_NPU_TRIPWIRE"):
        tripwire.arm(Path(product))
