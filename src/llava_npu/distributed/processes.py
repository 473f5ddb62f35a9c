"""The processes of a run: whoever started them (`--devices`, torchrun, accelerate launch), joined into one group."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count

import psutil
import torch.distributed as dist
from accelerate import Accelerator

from llava_npu.devices import Device
from llava_npu.distributed.launched import PeerLostError, local_world_size, rank, world_size
from llava_npu.errors import UserError

_INTERFACE = "GLOO_SOCKET_IFNAME"
_PATIENCE = "LLAVA_NPU_MEETING_SECONDS"
# What gloo and NCCL say of a process that is gone.
_LOST = re.compile(r"gloo/transport|Connection (closed|reset) by peer|Broken pipe|ncclRemoteError")
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
    except RuntimeError as error:
        if not launched or not _LOST.search(str(error)):
            raise
        raise PeerLostError(
            f"process {rank()} lost its connection to another one: that process, its machine or the network failed; "
            "what the other processes say last tells more. Checkpoints that were written are whole: the same command "
            f"continues from the newest one, also on fewer machines. ({_first_line(error)})"
        ) from error
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
    place = f"MASTER_ADDR:MASTER_PORT={os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    _choose_interface()
    try:
        store, number, size = _rendezvous()
    except dist.DistError as error:
        raise UserError(
            f"environment: process {rank()} did not meet all {world_size()} processes at {place} within "
            f"{_patience().total_seconds():.0f} s ({_first_line(error)}). Start the command on every machine, with the "
            "same two values there, and let that port and those from 32768 on through their firewalls. "
            f"{_PATIENCE}=SECONDS waits longer."
        ) from error
    store.set_timeout(timeout or dist.default_pg_timeout)
    named = dist.PrefixStore(f"group-{next(_numbers)}", store)
    try:
        dist.init_process_group(backend, store=named, rank=number, world_size=size, timeout=timeout)
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise UserError(
            f"environment: process {number} met the others at {place}, but cannot connect to one of them "
            f"({_first_line(error)}). Set {_INTERFACE} to the network interface that connects the machines (now: "
            f"{os.environ.get(_INTERFACE, 'not set')}), and let ports from 32768 on through their firewalls."
        ) from error


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
    return next(dist.rendezvous("env://", timeout=_patience()))


def _patience() -> timedelta:
    """How long the processes of a launch wait for each other at its start."""
    return timedelta(seconds=float(os.environ.get(_PATIENCE, "600")))


def _choose_interface() -> None:
    """Has gloo use the network interface from which this machine reaches the first one, where there are several.

    By itself it takes the one of the host's name, which on many machines is that of the machine alone (127.0.1.1).
    """
    if _INTERFACE in os.environ or "LOCAL_WORLD_SIZE" not in os.environ or local_world_size() == world_size():
        return
    try:
        found = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return  # it is for the meeting to say so
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(each.address.partition("%")[0] == address for each in addresses):
            os.environ[_INTERFACE] = name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()
