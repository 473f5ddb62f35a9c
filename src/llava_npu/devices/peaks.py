"""Peak matrix throughput by product, each with its source, and a measurement for what is not listed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s and memory of one product.

    Attributes:
        match: text that the device's name contains.
        bf16, fp16, fp32: dense matrix TFLOP/s (fp32: of plain fp32, not TF32).
        memory_gib: usable device memory.
        source: where the figures come from.
    """

    match: str
    bf16: float
    fp16: float
    fp32: float
    memory_gib: int
    source: str


_NVIDIA = "NVIDIA data sheet, dense figures (half of those with sparsity)"
_ASCEND = "Ascend/msmodeling tensor_cast/device.py: AI cores × 8192 FLOP × clock"

# The first match counts: longer names stand before shorter ones.
PEAKS = (
    Peak("H200", 989.0, 989.0, 67.0, 141, _NVIDIA),
    Peak("H100 PCIe", 756.0, 756.0, 51.0, 80, _NVIDIA),
    Peak("H100", 989.0, 989.0, 67.0, 80, _NVIDIA),
    Peak("A100-SXM4-40GB", 312.0, 312.0, 19.5, 40, _NVIDIA),
    Peak("A100", 312.0, 312.0, 19.5, 80, _NVIDIA),
    # 24 cores × 1.8 GHz: the 376T SKU. Which name belongs to which SKU rests on third-party logs.
    Peak("910B1", 353.9, 376.0, 0.0, 64, _ASCEND),
    Peak("910B2", 353.9, 376.0, 0.0, 64, _ASCEND),
    Peak("910B3", 294.9, 313.0, 0.0, 64, _ASCEND),  # 20 cores × 1.8 GHz: the 313T SKU
    Peak("910B4", 245.8, 280.0, 0.0, 32, _ASCEND),  # 20 cores × 1.5 GHz: the 280T SKU
    Peak("910_93", 353.9, 376.0, 0.0, 64, _ASCEND),  # one die of an A3
)


def published_tflops(name: str, dtype: torch.dtype) -> float | None:
    """The published dense TFLOP/s of the product called `name`, or None if it is not listed."""
    for peak in PEAKS:
        if peak.match in name:
            figure = {torch.bfloat16: peak.bf16, torch.float16: peak.fp16}.get(dtype, peak.fp32)
            return figure or None
    return None


@functools.cache
def measured_tflops(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> float:
    """TFLOP/s of a square matrix product on `device`: the best of a few, within about a second."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + 1.0
    while True:
        start = time.perf_counter()
        a @ a
        synchronize()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > deadline:
            return 2 * size**3 / best / 1e12
