"""Every place where the host waits for the device is counted, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu
from torch import nn
from torch_npu.simulation import count_host_syncs

SYNCS: dict[str, tuple[Callable[[torch.Tensor], object], dict[str, int]]] = {
    "item": (lambda x: x[0, 0].item(), {"aten::_local_scalar_dense": 1}),
    "float": (lambda x: float(x.sum()), {"aten::_local_scalar_dense": 1}),
    "bool": (lambda x: bool((x > 0).all()), {"aten::_local_scalar_dense": 1}),
    "cpu": (lambda x: x.cpu(), {"copy_device_to_host": 1}),
    "tolist": (lambda x: x.tolist(), {"copy_device_to_host": 1}),
    "numpy": (lambda x: x.to("cpu").numpy(), {"copy_device_to_host": 1}),
    "copy_": (lambda x: torch.empty(4, 4).copy_(x), {"copy_device_to_host": 1}),
    "non_blocking to pageable": (
        lambda x: torch.empty(4, 4).copy_(x, non_blocking=True),
        {"copy_device_to_host": 1},
    ),
    "nonzero": (lambda x: x.nonzero(), {"aten::nonzero": 1}),
    "where": (lambda x: torch.where(x > 0), {"aten::nonzero": 1}),
    "read mask": (lambda x: x[x > 0], {"aten::nonzero": 1}),
    "assign mask": (lambda x: x.index_put_((x > 0,), x[0, 0]), {"aten::_index_put_impl_": 1}),
    "masked_select": (lambda x: torch.masked_select(x, x > 0), {"aten::masked_select": 1}),
    "unique": (lambda x: x.unique(), {"aten::_unique2": 1}),
    "equal": (lambda x: torch.equal(x, x), {"aten::equal": 1}),
    "repeat_interleave": (lambda x: torch.repeat_interleave(x[0].abs().long()), {"aten::repeat_interleave": 1}),
    "synchronize": (lambda x: torch.npu.synchronize(), {"synchronize": 1}),
    "stream": (lambda x: torch.npu.current_stream().synchronize(), {"synchronize": 1}),
}


@pytest.mark.parametrize(("work", "expected"), SYNCS.values(), ids=SYNCS)
def test_counted(work: Callable[[torch.Tensor], object], expected: dict[str, int]) -> None:
    x = torch.full((4, 4), 2.0, device="npu")
    x[0] = 1.0
    with count_host_syncs() as syncs:
        work(x)
    assert syncs.by_kind == expected
    assert syncs.total == sum(expected.values())


FREE: dict[str, Callable[[torch.Tensor], object]] = {
    "arithmetic": lambda x: (x @ x + 1).softmax(-1).sum(),
    "index": lambda x: x[torch.arange(2, device="npu")] + x[1:3, :],
    "where of three": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "repeat_interleave with size": lambda x: x.repeat_interleave(2, dim=0),
    "device copy": lambda x: x.to("npu:1"),
    "non_blocking to pinned": lambda x: torch.empty(4, 4, pin_memory=True).copy_(x, non_blocking=True),
    "clip": lambda x: nn.utils.clip_grads_with_norm_([x], 1.0, x.norm()),
    "cross entropy": lambda x: nn.functional.cross_entropy(x, torch.zeros(4, dtype=torch.long, device="npu")),
}


@pytest.mark.parametrize("work", FREE.values(), ids=FREE)
def test_not_counted(work: Callable[[torch.Tensor], object]) -> None:
    x = torch.full((4, 4), 2.0, device="npu")
    with count_host_syncs() as syncs:
        work(x)
    assert syncs.by_kind == {}


def test_uploads_are_apart() -> None:
    page, pinned = torch.ones(4), torch.ones(4).pin_memory()
    with count_host_syncs() as syncs:
        page.to("npu")
        page.to("npu", non_blocking=True)  # pageable memory cannot be read behind the host's back
        pinned.to("npu")
        pinned.to("npu", non_blocking=True)
    assert (syncs.total, syncs.uploads) == (0, 3)


def test_checks_inside_fused_operators_do_not_count() -> None:
    q = torch.randn(1, 4, 2, 8, device="npu")
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)
    with count_host_syncs() as syncs:
        torch_npu.npu_fusion_attention(q, q, q, 2, "BSND", atten_mask=mask, sparse_mode=3)
    assert syncs.by_kind == {}


def test_a_whole_training_step_without_a_sync() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Dropout(0.1), nn.Linear(8, 10)).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 10, (2, 6)).to("npu")

    def step() -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step()  # the first makes the optimizer's state
    with count_host_syncs() as syncs:
        loss = step()
    assert syncs.by_kind == {}
    with count_host_syncs() as syncs:
        loss.item()
    assert syncs.total == 1
