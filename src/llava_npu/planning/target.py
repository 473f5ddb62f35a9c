"""The devices that a run is planned for: this machine's, or a product by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_npu import devices
from llava_npu.devices import Device
from llava_npu.devices.peaks import PEAKS, published
from llava_npu.errors import UserError, nearest
from llava_npu.training.parts import DTYPES, Precision, compute_dtype

GIB = 2**30
# What drivers, communication libraries and the allocator's rounding take of an accelerator, or other programs of a CPU.
# A choice with a margin, not a measurement.
HEADROOM = 0.08


@dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
        name: of the product.
        kind: as in `devices.kinds()`.
        count: devices in all, over all nodes.
        nodes: machines.
        memory: bytes of one device; where they share one memory (CPUs), of one process's share.
        peak_flops: dense operations per second of one device in the type computed in; None: not known.
        peak_source: where that figure comes from.
        compute_dtype: 16-bit type to compute in; None: float32.
    """

    name: str
    kind: str
    count: int
    nodes: int
    memory: int
    peak_flops: float | None
    peak_source: str
    compute_dtype: torch.dtype | None

    @property
    def usable_memory(self) -> int:
        """Bytes of one device that tensors may take."""
        return int(self.memory * (1 - HEADROOM))


def product(name: str, count: int, nodes: int, precision: Precision) -> Target:
    """A listed product, as in "ascend-910b2" or "h200".

    Raises:
        UserError: it is not listed.
    """
    peak = published(name)
    if peak is None:
        known = [each.match.lower() for each in PEAKS]
        raise UserError(f"--device {name!r}: not listed.{nearest(name.lower(), known)} Known: {', '.join(known)}.")
    dtype = torch.bfloat16 if precision == "auto" else DTYPES[precision]
    flops = peak.tflops(dtype or torch.float32) * 1e12
    return Target(peak.match, peak.kind, count * nodes, nodes, peak.memory_gib * GIB, flops or None, peak.source, dtype)


def this_machine(device: Device, count: int, nodes: int, precision: Precision, *, for_time: bool = True) -> Target:
    """Devices like the one at hand.

    Args:
        for_time: find their peak, which on a device that is not listed takes a second of computing.
    """
    dtype = compute_dtype(precision, device)
    memory = device.memory()
    # Of a CPU, what other programs have is not to be had, and processes share what is left.
    amount = memory.total if device.kind != "cpu" else memory.free // count
    flops, source = None, "not asked for"
    if for_time:
        flops = device.peak_tflops(dtype or torch.float32) * 1e12
        source = "published" if published(device.name) and not device.simulated else "measured on this machine"
    return Target(device.name, device.kind, count * nodes, nodes, amount, flops, source, dtype)


def find_target(name: str | None, count: int | None, nodes: int, precision: Precision, configured: str) -> Target:
    """A product by name or, where none is given, what the run's configuration would choose here.

    Args:
        count: devices per node; None: one of a product, all of this machine's.
        configured: the run's `device`.
    """
    if name is not None and name.partition(":")[0] not in ("auto", *devices.kinds()):
        return product(name, count or 1, nodes, precision)
    device = devices.select(name or configured)
    return this_machine(device, count or device.count, nodes, precision)
