"""Several processes that answer one benchmark together, a device each.

`llava-npu eval --devices N` (or torchrun) tells each process by environment variables which one it
is. They meet before and after answering only, through the host's network: what the devices are does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from llava_npu import devices
from llava_npu.distributed.launched import world_size
from llava_npu.errors import UserError

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # one that fails ends the others through its launcher; a slow one is waited for


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's items: dealt out like cards, so that each gets as much of what is long."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Returns when all processes have reached this point."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def from_first(self, value: _T) -> _T:
        """The first process's value; what the others give is not looked at."""
        if self.count == 1:
            return value
        import torch.distributed

        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that were launched together with this one, connected; `ALONE` if there are none."""
    if world_size() == 1:
        yield ALONE
        return
    import torch.distributed

    from llava_npu.distributed.processes import form_group

    form_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


def check_devices(count: int, device: str) -> None:
    """Raises `UserError` where `count` processes cannot have a device each; on a CPU they share the cores."""
    kind, _, index = device.partition(":")
    if index:
        raise UserError(f"--device {device} with --devices {count}: each process takes its own; leave out ':{index}'.")
    chosen = devices.find(kind)
    if chosen.kind != "cpu" and count > chosen.count:
        raise UserError(f"--devices {count}: this machine has {chosen.count} of kind {chosen.kind}.")
