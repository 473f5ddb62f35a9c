"""The processes of a run: whoever started them (`--devices`, torchrun, accelerate launch), joined into one group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from llava_npu.devices import Device
from llava_npu.distributed import process_group
from llava_npu.distributed.launched import world_size
from llava_npu.errors import UserError

# Set by `accelerate launch` for engines that it configures itself.
_FOREIGN_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


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
            process_group.form(gloo)
        else:
            dist.init_process_group(gloo, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Accelerator(cpu=device.kind == "cpu")
    finally:
        if ours:
            dist.destroy_process_group()


def _check_number(device: Device) -> None:
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.kind != "cpu" and wanted > device.count:
        raise UserError(
            f"{wanted} processes on this machine, but it has {device.count} of the device {device.kind}: start one "
            "process per device."
        )
