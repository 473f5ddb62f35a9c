"""Counts of operators, and of the moments at which the host would wait for a real device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch_npu import _C

UPLOADS = "copy_host_to_device"


@dataclass
class HostSyncs:
    """Filled when the `with` block of `count_host_syncs` ends.

    by_kind: operator name ("aten::_local_scalar_dense" is `.item()`), "copy_device_to_host" (`.cpu()`, `.tolist()`),
        "copy_host_to_device" (a blocking copy, or one from memory that is not pinned) or "synchronize" -> how often.
    """

    by_kind: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Times that the host waited for the device's results. Uploads, which wait for a copy only, are apart."""
        return sum(count for kind, count in self.by_kind.items() if kind != UPLOADS)

    @property
    def uploads(self) -> int:
        return self.by_kind.get(UPLOADS, 0)


@contextmanager
def count_host_syncs() -> Iterator[HostSyncs]:
    """Counts over all threads and devices of this process:

    with count_host_syncs() as syncs:
        step(batch)
    assert syncs.total == 0, syncs.by_kind
    """
    syncs = HostSyncs()
    before = _C.host_sync_counts()
    try:
        yield syncs
    finally:
        syncs.by_kind = _difference(_C.host_sync_counts(), before)


@contextmanager
def op_counts() -> Iterator[dict[str, int]]:
    """Counts the operators that run on the simulated device, by name ("aten::add.Tensor"), in a `with` block."""
    counts: dict[str, int] = {}
    before = _C.op_counts()
    try:
        yield counts
    finally:
        counts.update(_difference(_C.op_counts(), before))


@contextmanager
def count_copied_bytes() -> Iterator[list[int]]:
    """Counts bytes copied from one tensor of the device to another in a `with` block: its list then has the number."""
    counted: list[int] = []
    before = _C.copied_bytes()
    try:
        yield counted
    finally:
        counted.append(_C.copied_bytes() - before)


def _difference(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
