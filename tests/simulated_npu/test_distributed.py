"""hccl: two processes on loopback, every collective against what it must give."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

RANKS = 2


def on_every_rank(rank: int, work: Callable[[int], None], meeting_point: str) -> None:
    import torch_npu  # noqa: F401

    torch.npu.set_device(rank)
    dist.init_process_group(
        "hccl", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def run(work: Callable[[int], None], tmp_path: Path) -> None:
    mp.spawn(on_every_rank, args=(work, str(tmp_path / "meeting-point")), nprocs=RANKS)


def collectives(rank: int) -> None:
    assert dist.get_backend() == "hccl"
    device = torch.device("npu", rank)

    def mine() -> torch.Tensor:
        return torch.tensor([1.0, 2.0], device=device) * (rank + 1)

    for operation, expected in {
        dist.ReduceOp.SUM: [3.0, 6.0],
        dist.ReduceOp.AVG: [1.5, 3.0],
        dist.ReduceOp.MAX: [2.0, 4.0],
        dist.ReduceOp.MIN: [1.0, 2.0],
    }.items():
        x = mine()
        dist.all_reduce(x, op=operation)
        assert x.tolist() == expected
    half = mine().bfloat16()
    dist.all_reduce(half, op=dist.ReduceOp.AVG)
    assert half.tolist() == [1.5, 3.0]

    work = dist.all_reduce(x := mine(), async_op=True)
    work.wait()
    assert x.tolist() == [3.0, 6.0]

    gathered = [torch.empty(2, device=device) for _ in range(RANKS)]
    dist.all_gather(gathered, mine())
    assert [t.tolist() for t in gathered] == [[1, 2], [2, 4]]
    flat = torch.empty(4, device=device)
    dist.all_gather_into_tensor(flat, mine())
    assert flat.tolist() == [1, 2, 2, 4]

    piece = torch.empty(1, device=device)
    dist.reduce_scatter(piece, list(mine().split(1)))
    assert piece.tolist() == [[3.0], [6.0]][rank]
    for operation, expected_pieces in {dist.ReduceOp.SUM: (3.0, 6.0), dist.ReduceOp.AVG: (1.5, 3.0)}.items():
        dist.reduce_scatter_tensor(piece, mine(), op=operation)
        assert piece.item() == expected_pieces[rank]

    x = mine()
    dist.broadcast(x, src=1)
    assert x.tolist() == [2, 4]
    dist.barrier()

    objects = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": 0}, {"rank": 1}]

    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(1))


def data_parallel(rank: int) -> None:
    replicated(rank)
    fully_sharded(rank)


def replicated(rank: int) -> None:
    """DDP: two ranks of half a batch each give the gradient of one rank with the whole batch."""
    torch.manual_seed(0)
    device = torch.device("npu", rank)
    reference = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    batch = torch.randn(4, 4)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(reference).to(device), device_ids=[rank])
    model(batch.chunk(RANKS)[rank].to(device)).mean().backward()
    reference(batch).mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


def fully_sharded(rank: int) -> None:
    """FSDP2 against the unsharded model."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    device = torch.device("npu", rank)
    reference = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    batch = torch.randn(4, 4)
    model = copy.deepcopy(reference).to(device)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("npu", (RANKS,)))
    model(batch.chunk(RANKS)[rank].to(device)).mean().backward()
    reference(batch).mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor().cpu(), theirs.grad)


@pytest.mark.parametrize("work", [collectives, data_parallel])
def test_two_processes(work: Callable[[int], None], tmp_path: Path) -> None:
    run(work, tmp_path)


TORCHRUN_PROGRAM = """
import os, torch, torch_npu, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.npu.set_device(rank)
dist.init_process_group("cpu:gloo,npu:hccl")
total = torch.tensor([rank + 1.0], device="npu")
dist.all_reduce(total)
count = torch.ones(1)
dist.all_reduce(count)
assert (total.item(), count.item()) == (3.0, 2.0), (total, count)
dist.destroy_process_group()
"""


def test_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TORCHRUN_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert answer.returncode == 0, answer.stderr
