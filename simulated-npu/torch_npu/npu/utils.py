"""Devices: how many there are, which one is current, what they are called."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from torch_npu import _C
from torch_npu.npu import allocator

NAME = "Ascend910B3 (simulated)"

DeviceLike = torch.device | str | int | None


def device_index(device: DeviceLike) -> int:
    """The index that `device` means; the current device for None, "npu" or a negative index."""
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        if device.type != "npu":
            raise ValueError(f"Expected a npu device, but got: {device}")
        device = device.index
    if device is None or device < 0:
        return current_device()
    return device


def is_available() -> bool:
    return True


def device_count() -> int:
    return _C.device_count()


def current_device() -> int:
    return torch.accelerator.current_device_index()


def set_device(device: DeviceLike) -> None:
    allocator.read_settings()
    torch.accelerator.set_device_index(device_index(device))


def synchronize(device: DeviceLike = None) -> None:
    torch.accelerator.synchronize(device_index(device))


def init() -> None:
    _lazy_init()


def is_initialized() -> bool:
    return _C.device_was_used() and not _C.is_bad_fork()


def _lazy_init() -> None:
    allocator.read_settings()
    _C.require_usable_device()


def _is_in_bad_fork() -> bool:
    return _C.is_bad_fork()


@dataclass(frozen=True)
class _NPUDeviceProperties:
    """The figures of an Ascend 910B with 24 cube cores, except that the name says what it is."""

    name: str
    total_memory: int
    cube_core_num: int = 24
    vector_core_num: int = 48
    L2_cache_size: int = 192 << 20


def get_device_name(device_name: DeviceLike = None) -> str:
    return get_device_properties(device_name).name


def get_device_properties(device_name: DeviceLike = None) -> _NPUDeviceProperties:
    index = device_index(device_name)
    if index >= device_count():
        raise AssertionError("Invalid device id")
    return _NPUDeviceProperties(name=NAME, total_memory=_C.memory_statistics(index).limit)


class device(contextlib.AbstractContextManager):  # noqa: N801  (the real name)
    """Context manager that changes the current device; does nothing for None or a negative index."""

    def __init__(self, device: DeviceLike) -> None:
        self.idx = -1 if device is None else device_index(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        if self.idx >= 0:
            self.prev_idx = current_device()
            set_device(self.idx)

    def __exit__(self, *exception: Any) -> None:
        if self.idx >= 0:
            set_device(self.prev_idx)


class device_of(device):  # noqa: N801  (the real name)
    """Context manager that makes the device of `obj` current; does nothing for a tensor that is not on an NPU."""

    def __init__(self, obj: torch.Tensor) -> None:
        super().__init__(obj.device if obj.device.type == "npu" else None)
