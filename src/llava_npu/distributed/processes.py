"""The processes of a run: whoever started them (`--devices`, torchrun, accelerate launch), joined into one group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import TYPE_CHECKING

import torch.distributed as dist
from accelerate import Accelerator

from llava_npu.devices import Device
from llava_npu.distributed.launched import local_world_size, world_size
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from datetime import timedelta


# Set by `accelerate launch` for engines that it configures itself.
_FOREIGN_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
# What a launcher of this one process would have set; DeepSpeed reads LOCAL_RANK at every step.
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@contextmanager
def join(device: Device, needs_group: bool) -> Iterator[Accelerator]:
    """Joins this process to the others of its launch, if there are any.

    Tensors on the host are exchanged over gloo next to the device's own backend: what is counted on the host need not
    wait for the device.

    Args:
        needs_group: make a group even of a single process, for engines that do not work without.
    """
    for variable in _FOREIGN_ENGINES:
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"{variable} is set: `accelerate launch` is configured to bring its own engine. The engine is chosen "
                "by `engine` in the run's configuration; launch with --multi_gpu (or torchrun, or --devices) alone."
            )
    # DeepSpeed, which accelerate imports where it is installed, else looks for a device itself and talks about it.
    os.environ.setdefault("DS_ACCELERATOR", device.kind)
    _check_number(device)
    launched = world_size() > 1
    ours = (launched or needs_group) and not dist.is_initialized()
    if ours:
        gloo = "gloo" if device.kind == "cpu" else f"cpu:gloo,{device.kind}:{device.distributed_backend}"
        if launched:
            form_group(gloo)
        else:
            dist.init_process_group(gloo, store=dist.HashStore(), rank=0, world_size=1)
    variables: dict[str, str] = {}
    try:
        accelerator = Accelerator(cpu=device.kind == "cpu")
        if needs_group and not launched:  # not before: accelerate would look for a launcher
            variables = {name: value for name, value in _ALONE.items() if name not in os.environ}
            os.environ.update(variables)
        yield accelerator
    finally:
        for name in variables:
            os.environ.pop(name, None)
        if ours:
            dist.destroy_process_group()


def _check_number(device: Device) -> None:
    wanted = local_world_size()
    if device.kind != "cpu" and wanted > device.count:
        raise UserError(
            f"{wanted} processes on this machine, but it has {device.count} of the device {device.kind}: start one "
            "process per device."
        )


_numbers = count()


def form_group(backend: str, timeout: timedelta | None = None) -> None:
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


def neighbours(size: int) -> dist.ProcessGroup | None:
    """The group of `size` processes with neighbouring ranks that this one belongs to; None: it is alone.

    Every process calls it, once for each formed group.
    """
    if size == 1:
        return None
    starts = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(list(range(start, start + size))) for start in starts]
    return groups[dist.get_rank() // size]


@cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """The launcher's store, this process's rank, and how many there are. One store lasts for all groups."""
    return next(dist.rendezvous("env://"))
