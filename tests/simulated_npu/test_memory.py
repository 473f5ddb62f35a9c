"""Memory accounting, the limit, and pinned host memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch_npu.simulation import memory_limit, parse_bytes, set_memory_limit

MIB = 1 << 20


def test_allocations_are_counted_to_the_byte() -> None:
    gc.collect()
    before = torch.npu.memory_allocated()
    x = torch.empty(3 * MIB, dtype=torch.uint8, device="npu")
    y = x + 1  # made by a CPU kernel, held by the device
    assert torch.npu.memory_allocated() - before == 6 * MIB
    view = y[:1]
    del x, y
    assert torch.npu.memory_allocated() - before == 3 * MIB
    del view
    assert torch.npu.memory_allocated() == before


def test_peak_and_reset() -> None:
    gc.collect()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    assert torch.npu.max_memory_allocated() == before
    x = torch.empty(2 * MIB, dtype=torch.uint8, device="npu")
    del x
    assert torch.npu.max_memory_allocated() - before == 2 * MIB
    assert torch.npu.memory_allocated() == before
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == before
    assert torch.npu.memory_stats()["allocated_bytes.all.current"] == before
    assert torch.accelerator.memory_allocated() == before


def test_each_device_counts_its_own() -> None:
    before = torch.npu.memory_allocated("npu:0"), torch.npu.memory_allocated("npu:1")
    x = torch.empty(MIB, dtype=torch.uint8, device="npu:1")
    after = torch.npu.memory_allocated("npu:0"), torch.npu.memory_allocated("npu:1")
    assert (after[0] - before[0], after[1] - before[1]) == (0, x.nbytes)


def test_beyond_the_limit_is_out_of_memory_and_nothing_is_lost() -> None:
    gc.collect()
    before = torch.npu.memory_allocated()
    ooms = torch.npu.memory_stats()["num_ooms"]
    with memory_limit(before + 8 * MIB):
        free, total = torch.npu.mem_get_info()
        assert (free, total) == (8 * MIB, before + 8 * MIB)
        assert torch.npu.get_device_properties().total_memory == total
        x = torch.empty(5 * MIB, dtype=torch.uint8, device="npu")
        with pytest.raises(torch.OutOfMemoryError, match=r"NPU out of memory\. Tried to allocate 5\.00 MiB \(NPU 0; "):
            torch.empty_like(x)
        with pytest.raises(torch.OutOfMemoryError):  # an operator's result, too
            x + 1
        assert torch.npu.memory_allocated() - before == 5 * MIB
        del x
        assert torch.empty(8 * MIB, dtype=torch.uint8, device="npu").nbytes == 8 * MIB
    assert torch.npu.memory_stats()["num_ooms"] == ooms + 2


def test_limit_of_all_devices_and_its_default() -> None:
    assert torch.npu.mem_get_info("npu:1")[1] == 64 << 30
    try:
        set_memory_limit(MIB)
        for index in range(2):
            with pytest.raises(torch.OutOfMemoryError, match=f"NPU {index}; 1.00 MiB total capacity"):
                torch.empty(2 * MIB, dtype=torch.uint8, device=f"npu:{index}")
    finally:
        set_memory_limit(64 << 30)
    with pytest.raises(RuntimeError, match="must be positive"):
        set_memory_limit(0)


@pytest.mark.parametrize(
    ("text", "expected"), [("1024", 1024), ("2KiB", 2048), ("1.5 MiB", 3 << 19), ("64GiB", 64 << 30)]
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "3GB", "1 2"])
def test_parse_bytes_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="not an amount of memory"):
        parse_bytes(text)


def test_pinned_memory() -> None:
    x = torch.arange(8.0)
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert pinned[2:].is_pinned()
    assert not x.is_pinned()
    assert torch.equal(pinned, x)
    assert torch.equal(pinned.to("npu", non_blocking=True).cpu(), x)
    assert torch.empty(4, pin_memory=True).is_pinned()
