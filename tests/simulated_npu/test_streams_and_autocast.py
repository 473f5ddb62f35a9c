"""Streams, events, mixed precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def test_streams() -> None:
    default = torch.npu.current_stream()
    side = torch.npu.Stream()
    assert side != default
    assert default == torch.npu.default_stream()
    with torch.npu.stream(side):
        assert torch.npu.current_stream() == side
        x = torch.ones(3, device="npu")
    assert torch.npu.current_stream() == default
    default.wait_stream(side)
    x.record_stream(default)
    assert side.query()
    with torch.npu.stream(None):
        assert torch.npu.current_stream() == default


def test_streams_of_another_device() -> None:
    side = torch.npu.Stream(device="npu:1")
    assert side.device == torch.device("npu:1")
    with torch.npu.stream(side):
        assert torch.npu.current_stream("npu:1") == side
        assert torch.npu.current_device() == 1
    assert torch.npu.current_device() == 0
    assert torch.npu.current_stream("npu:1") != side


def test_events_measure_time() -> None:
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        torch.ones(64, 64, device="npu") @ torch.ones(64, 64, device="npu")
    end.record()
    end.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(end) < 60_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, layer = torch.ones(2, 4, device="npu"), nn.Linear(4, 4).to("npu")
    with torch.autocast("npu", dtype=dtype):
        assert torch.npu.get_autocast_dtype() == dtype
        y = layer(x)
        assert y.dtype == dtype  # matrix products in low precision
        assert y.softmax(-1).dtype == torch.float32  # reductions in float32
        assert (y + x).dtype == torch.float32  # the widest input
        with torch.autocast("npu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert layer(x).dtype == torch.float32
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_autocast_of_npu_leaves_cpu_alone() -> None:
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_grad_scaler_skips_a_step_with_an_infinite_gradient() -> None:
    weight = nn.Parameter(torch.ones(2, device="npu"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("npu", init_scale=4.0)
    for gradient, expected in ((float("inf"), 1.0), (0.5, 0.5)):
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [expected, expected]
    assert scaler.get_scale() == 2.0
