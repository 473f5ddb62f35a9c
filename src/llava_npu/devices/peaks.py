"""Peak matrix throughput by product, each with its source, and a measurement for what is not listed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llava_npu.devices.host_speeds import processor_seconds

_NVIDIA = "NVIDIA data sheet, dense figures (half of those with sparsity)"
_ASCEND = "Ascend/msmodeling tensor_cast/device.py (commit 84fec853); bf16 = AI cores × 8192 FLOP × clock"


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s and memory of one product.

    Attributes:
        kind: of device, as in `devices.kinds()`.
        match: text that the device's name contains.
        bf16, fp16, fp32: dense matrix TFLOP/s (fp32: of plain fp32, not TF32).
        memory_gib: usable device memory.
        source: where the figures come from.
        cores, clock_ghz: of an Ascend, from which its bf16 figure follows (`cube_tflops`).
        memory_gb_s: of its memory, in 10⁹ bytes per second; from the same sources.
        link_gb_s: one way to the other devices of its node; for GPUs half of the bidirectional figure of NVLink (or
            PCIe 5) that the data sheets give. None: not known.
        node_link_gb_s: one way to other nodes; for GPUs an assumption, a 400 Gbit/s adapter for each.
    """

    kind: str
    match: str
    bf16: float
    fp16: float
    fp32: float
    memory_gib: int
    source: str
    cores: int | None = None
    clock_ghz: float | None = None
    memory_gb_s: float | None = None
    link_gb_s: float | None = None
    node_link_gb_s: float = 50.0

    def tflops(self, dtype: torch.dtype) -> float:
        """Dense TFLOP/s for `dtype`; 0.0 where none is published."""
        return {torch.bfloat16: self.bf16, torch.float16: self.fp16}.get(dtype, self.fp32)


_FLOP_PER_CYCLE = 8192  # of one AI core: 16 × 16 × 16 multiplications and additions in half precision


def cube_tflops(cores: int, clock_ghz: float) -> float:
    """Dense half-precision TFLOP/s of an Ascend's AI cores."""
    return cores * _FLOP_PER_CYCLE * clock_ghz / 1e3


def _ascend(match: str, cores: int, clock_ghz: float, fp16: float, **others: Any) -> Peak:
    bf16 = round(cube_tflops(cores, clock_ghz), 1)
    return Peak("npu", match, bf16, fp16, 0.0, source=_ASCEND, cores=cores, clock_ghz=clock_ghz, **others)


_A2 = {"memory_gib": 64, "memory_gb_s": 1759, "link_gb_s": 196, "node_link_gb_s": 25}

# The first match counts: longer names stand before shorter ones.
PEAKS = (
    Peak("cuda", "H200", 989.0, 989.0, 67.0, 141, _NVIDIA, memory_gb_s=4800, link_gb_s=450),
    Peak("cuda", "H100 PCIe", 756.0, 756.0, 51.0, 80, _NVIDIA, memory_gb_s=2000, link_gb_s=64),
    Peak("cuda", "H100", 989.0, 989.0, 67.0, 80, _NVIDIA, memory_gb_s=3350, link_gb_s=450),
    Peak("cuda", "A100-SXM4-40GB", 312.0, 312.0, 19.5, 40, _NVIDIA, memory_gb_s=1555, link_gb_s=300),
    Peak("cuda", "A100", 312.0, 312.0, 19.5, 80, _NVIDIA, memory_gb_s=2039, link_gb_s=300),
    # The 376T, 313T and 280T products. Which name belongs to which rests on third-party logs.
    _ascend("910B1", cores=24, clock_ghz=1.8, fp16=376.0, **_A2),
    _ascend("910B2", cores=24, clock_ghz=1.8, fp16=376.0, **_A2),
    _ascend("910B3", cores=20, clock_ghz=1.8, fp16=313.0, **_A2),
    # Listed with 32 GiB as a PCIe card only.
    _ascend("910B4", 20, 1.5, 280.0, memory_gib=32, memory_gb_s=880, link_gb_s=64, node_link_gb_s=25),
    # One die of an A3; a node has sixteen. Of the smaller product (560T) the name is not published.
    _ascend(
        "910_93",
        cores=24,
        clock_ghz=1.8,
        fp16=376.0,
        memory_gib=64,
        memory_gb_s=1759,
        link_gb_s=196,
        node_link_gb_s=196,
    ),
    Peak(
        "npu",
        "950PR",
        378.0,
        378.0,
        0.0,
        112,
        "Ascend/msmodeling tensor_cast/device.py, class A5 (Atlas 350)",
        memory_gb_s=1539,
        link_gb_s=159,
        node_link_gb_s=25,
    ),
)


def published(name: str) -> Peak | None:
    """The entry of the product called `name`, or None if it is not listed."""
    return next((peak for peak in PEAKS if peak.match.lower() in name.lower()), None)


def published_tflops(name: str, dtype: torch.dtype, cores: int | None = None) -> float | None:
    """The published dense TFLOP/s of the product called `name`, or None if it is not listed.

    Args:
        cores: AI cores as the device itself counts them; where the table has another count, the figure follows them.
    """
    peak = published(name)
    if peak is None:
        return None
    figure = peak.tflops(dtype)
    if cores and peak.cores:
        figure *= cores / peak.cores
    return figure or None


def measured_tflops(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> float:
    """TFLOP/s of a square matrix product on `device`: the best of a few, within about a second, once per process."""
    if (device, dtype) not in _measured:
        _measured[device, dtype] = _measure(device, dtype, synchronize)
    return _measured[device, dtype]


_measured: dict[tuple[torch.device, torch.dtype], float] = {}


_SMALLEST, _LARGEST = 1024, 8192
_LONG_ENOUGH = 2e-3  # seconds: a product that takes less says more about its launch than about the device


def _measure(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> float:
    """Products grow only on a device that makes short work of them: a simulated one computes on its host."""
    size, best = _SMALLEST, float("inf")
    deadline = time.perf_counter() + 1.0
    while True:
        a = torch.ones(size, size, device=device, dtype=dtype)
        for _ in range(3):  # the first may load its kernel
            start = _now(device)
            a @ a
            synchronize()
            best = min(best, _now(device) - start)
        if device.type != "cpu" and best < _LONG_ENOUGH and size < _LARGEST:
            size, best = size * 2, float("inf")
        elif time.perf_counter() > deadline:
            return 2 * size**3 / best / 1e12


def measured_bandwidth(device: torch.device, synchronize: Callable[[], None]) -> float:
    """Bytes per second that a copy within the device's memory reads and writes: the best of a few."""
    source = torch.ones(_COPIED // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(4):  # the first maps the memory
        start = _now(device)
        target.copy_(source)
        synchronize()
        best = min(best, _now(device) - start)
    return 2 * _COPIED / best


_COPIED = 2**28  # bytes: more than caches hold


def _now(device: torch.device) -> float:
    return processor_seconds() if device.type == "cpu" else time.perf_counter()
