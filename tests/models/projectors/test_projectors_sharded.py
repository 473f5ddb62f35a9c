"""FSDP2 on two processes (Gloo, CPU): outputs and gradients equal those of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_projectors import VARIANTS, build, random_features
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def compare_sharded_with_whole(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for type, options in VARIANTS:
        if type == "identity":
            continue
        torch.manual_seed(0)
        whole, sharded = build(type, options), build(type, options)
        sharded.load_state_dict(whole.state_dict())
        fully_shard(sharded, mesh=mesh)
        batches = [random_features(whole) for _ in range(2)]
        outputs = [whole(batch) for batch in batches]
        (sum(output.square().mean() for output in outputs) / 2).backward()
        output = sharded(batches[rank])
        torch.testing.assert_close(output, outputs[rank])
        output.square().mean().backward()
        for name, parameter in sharded.named_parameters():
            assert isinstance(parameter, DTensor)
            gradient = parameter.grad.full_tensor()
            torch.testing.assert_close(
                gradient, whole.get_parameter(name).grad, msg=lambda text, n=name: f"{n}: {text}"
            )
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # all is compared; an ordinary exit races with the backend's threads and now and then aborts


@pytest.mark.slow
def test_fsdp2_equals_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(compare_sharded_with_whole, args=(str(tmp_path / "store"),), nprocs=2)
