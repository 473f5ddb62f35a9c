"""The memory that a simulated device has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch_npu import _C
from torch_npu.npu.utils import DeviceLike, device_count, device_index

UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_bytes(text: str) -> int:
    """'1024', '512MiB', '1.5 GiB' -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS:
        raise ValueError(f"not an amount of memory: {text!r}; write bytes, or a number with KiB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2]])


def set_memory_limit(limit: int, device: DeviceLike = None) -> None:
    """Sets the memory of `device` (None: of every device) in bytes; what would exceed it raises an out-of-memory error.

    Counted are tensors, not the scratch memory inside one CPU kernel.
    """
    indices = range(device_count()) if device is None else [device_index(device)]
    for index in indices:
        _C.set_memory_limit(index, limit)


@contextmanager
def memory_limit(limit: int, device: DeviceLike = None) -> Iterator[None]:
    """Sets a limit in bytes for the time of a `with` block, for one device (the current one by default)."""
    index = device_index(device)
    before = _C.memory_statistics(index).limit
    _C.set_memory_limit(index, limit)
    try:
        yield
    finally:
        _C.set_memory_limit(index, before)
