"""The group of all processes that a launcher started together, formed again whenever one process needs it."""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from datetime import timedelta

_numbers = count()


def form(backend: str, timeout: timedelta | None = None) -> None:
    """Joins this process to the others of its launch (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`).

    Undone by `torch.distributed.destroy_process_group`, after which a group may be formed again: each has names of its
    own in the launcher's store. Without, the processes of a second group would find the addresses of the first there,
    and those that come early would wait for connections that nobody accepts.

    Args:
        backend: as for `torch.distributed.init_process_group`.
        timeout: how long one process waits for the others; torch's default if none.
    """
    store, rank, size = _rendezvous()
    if timeout is not None:
        store.set_timeout(timeout)
    named = dist.PrefixStore(f"group-{next(_numbers)}", store)
    dist.init_process_group(backend, store=named, rank=rank, world_size=size, timeout=timeout)


@cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """The launcher's store, this process's rank, and how many there are. One store lasts for all groups."""
    return next(dist.rendezvous("env://"))
