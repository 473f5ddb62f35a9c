"""The devices that a run is planned for: this machine's, or a product by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_npu import devices
from llava_npu.devices import Device
from llava_npu.devices.host_speeds import HostSpeeds, host_speeds
from llava_npu.devices.peaks import PEAKS, Peak, measured_bandwidth, published
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
        bandwidth: bytes per second of one device's memory; None: not known.
        link: bytes per second from one device to the others, over the slowest link between them; None: not known.
        host_speeds: of a CPU, what its operations take otherwise; None for other devices.
    """

    name: str
    kind: str
    count: int
    nodes: int
    memory: int
    peak_flops: float | None
    peak_source: str
    compute_dtype: torch.dtype | None
    bandwidth: float | None = None
    link: float | None = None
    host_speeds: HostSpeeds | None = None

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
    memory = peak.memory_gib * GIB
    speeds = _speeds(peak, nodes)
    return Target(peak.match, peak.kind, count * nodes, nodes, memory, flops or None, peak.source, dtype, *speeds)


def _speeds(peak: Peak, nodes: int) -> tuple[float | None, float | None]:
    """Bytes per second of a product's memory, and of the slowest link that a run uses."""
    memory = None if peak.memory_gb_s is None else peak.memory_gb_s * 1e9
    link = peak.link_gb_s if nodes == 1 else peak.node_link_gb_s
    return memory, None if link is None else link * 1e9


def this_machine(device: Device, count: int, nodes: int, precision: Precision, *, for_time: bool = True) -> Target:
    """Devices like the one at hand.

    Args:
        for_time: find their speeds, which on a device that is not listed takes seconds of computing.
    """
    dtype = compute_dtype(precision, device)
    memory = device.memory()
    # Of a CPU, what other programs have is not to be had, and processes share what is left.
    amount = memory.total if device.kind != "cpu" else memory.free // count
    flops, source, known = None, "not asked for", None if device.simulated else published(device.name)
    speeds: tuple[float | None, float | None] = (None, None) if known is None else _speeds(known, nodes)
    measured = None
    if for_time:
        flops = device.peak_tflops(dtype or torch.float32) * 1e12
        source = "published" if known else "measured on this machine"
        if known is None and not device.simulated:
            speeds = measured_bandwidth(device.torch_device, device.synchronize), None
        if device.kind == "cpu":
            measured = host_speeds(device.name, dtype or torch.float32)
    name, kind = device.name, device.kind
    return Target(name, kind, count * nodes, nodes, amount, flops, source, dtype, *speeds, measured)


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
