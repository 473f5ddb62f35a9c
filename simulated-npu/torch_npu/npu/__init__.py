"""The device module `torch_npu.npu`, which torch also knows as `torch.npu`. Names and arguments are the real ones."""

from __future__ import annotations

import torch

from torch_npu.npu.amp_support import (
    get_amp_supported_dtype,
    get_autocast_dtype,
    is_autocast_enabled,
    is_bf16_supported,
    set_autocast_dtype,
    set_autocast_enabled,
)
from torch_npu.npu.memory import (
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_max_memory_allocated,
    reset_peak_memory_stats,
)
from torch_npu.npu.options import config, conv, is_jit_compile_false, matmul, set_compile_mode
from torch_npu.npu.random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from torch_npu.npu.streams import Event, Stream, StreamContext, current_stream, default_stream, set_stream, stream
from torch_npu.npu.utils import (
    _is_in_bad_fork as _is_in_bad_fork,
)
from torch_npu.npu.utils import (
    _lazy_init as _lazy_init,
)
from torch_npu.npu.utils import (
    current_device,
    device,
    device_count,
    device_of,
    get_device_name,
    get_device_properties,
    init,
    is_available,
    is_initialized,
    set_device,
    synchronize,
)

__all__ = [
    "Event",
    "Stream",
    "StreamContext",
    "config",
    "conv",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "device_of",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_autocast_dtype",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "init",
    "initial_seed",
    "is_autocast_enabled",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "is_jit_compile_false",
    "manual_seed",
    "manual_seed_all",
    "matmul",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_max_memory_allocated",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "set_autocast_dtype",
    "set_autocast_enabled",
    "set_compile_mode",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
]


def __getattr__(name: str) -> bool:
    if name == "_initialized":  # asked by torch.utils.checkpoint: is there a device RNG state to keep?
        return is_initialized()
    raise AttributeError(f"module 'torch_npu.npu' has no attribute {name!r}")


class _LegacyTensorType:
    """`torch.npu.FloatTensor` and its kin: torch names the type of a device tensor so, and some libraries call it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, data: object) -> torch.Tensor:
        return torch.tensor(data, dtype=self.dtype, device="npu")


BFloat16Tensor = _LegacyTensorType(torch.bfloat16)
BoolTensor = _LegacyTensorType(torch.bool)
ByteTensor = _LegacyTensorType(torch.uint8)
DoubleTensor = _LegacyTensorType(torch.float64)
FloatTensor = _LegacyTensorType(torch.float32)
HalfTensor = _LegacyTensorType(torch.float16)
IntTensor = _LegacyTensorType(torch.int32)
LongTensor = _LegacyTensorType(torch.int64)
