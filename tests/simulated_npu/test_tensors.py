"""Tensors and autograd on the simulated device: results of the CPU, manners of an accelerator."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_npu
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_everything_says_simulated() -> None:
    assert torch_npu.__version__ == "2.13.0+simulated"
    assert torch.npu.get_device_name() == "Ascend910B3 (simulated)"
    assert "(simulated)" in torch.npu.get_device_properties(0).name
    with torch_npu.simulation.memory_limit(1 << 20), pytest.raises(torch.OutOfMemoryError, match="simulated NPU"):
        torch.empty(1 << 20, device="npu")


def test_device_of_a_tensor() -> None:
    x = torch.ones(2, 3, device="npu")
    assert x.device == torch.device("npu", 0)
    assert x.is_npu
    assert str(x.device) == "npu:0"
    assert (x + 1).device.type == "npu"
    assert x.cpu().device.type == "cpu"
    assert torch.ones(2).npu().device.type == "npu"
    assert nn.Linear(2, 2).npu().weight.device.type == "npu"
    assert torch.accelerator.current_accelerator() == torch.device("npu")


def test_views_share_memory_and_resizes_do_not_lose_it() -> None:
    x = torch.arange(6.0, device="npu").view(2, 3)
    x.t()[0].zero_()
    assert x.tolist() == [[0, 1, 2], [0, 4, 5]]
    x.resize_(4, 3)
    assert x[:2].tolist() == [[0, 1, 2], [0, 4, 5]]
    assert torch.add(x[:2], 1, out=torch.empty(0, device="npu")).shape == (2, 3)


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 8), nn.Linear(8, 5)
    )


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_training_equals_cpu(options: dict[str, bool]) -> None:
    """Reference: the same network, data and AdamW on the CPU."""
    torch.manual_seed(0)
    reference = small_network()
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))
    losses = {}
    for device in ("cpu", "npu"):
        model = copy.deepcopy(reference).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        losses[device] = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
    assert losses["npu"] == pytest.approx(losses["cpu"], rel=1e-6)
    assert losses["npu"][-1] < losses["npu"][0]


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_checkpointing_keeps_dropout_in_step(index: int) -> None:
    """The recomputed forward must draw the same dropout mask, which needs the device's RNG state."""
    x = torch.ones(64, device=f"npu:{index}", requires_grad=True)
    y = checkpoint(lambda t: nn.functional.dropout(t, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: torch.cat((a, b)),
        lambda a, b: a @ b,
        lambda a, b: nn.functional.linear(a, b),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: nn.functional.conv2d(a.view(1, 1, 4, 4), b.view(1, 1, 4, 4)),
    ],
    ids=["add", "cat", "matmul", "linear", "where", "conv"],
)
def test_cpu_and_npu_do_not_mix(mixed) -> None:  # type: ignore[no-untyped-def]
    on_npu, on_cpu = torch.ones(4, 4, device="npu"), torch.ones(4, 4)
    for a, b in ((on_npu, on_cpu), (on_cpu, on_npu)):
        with pytest.raises(RuntimeError, match=r"same device|should be the same"):
            mixed(a, b)


def test_cpu_scalars_and_cpu_indices_are_welcome() -> None:
    x = torch.arange(4.0, device="npu")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert x[torch.tensor([3, 0])].tolist() == [3, 0]


def test_several_devices() -> None:
    assert torch.npu.device_count() == 2
    x = torch.ones(2, device="npu:1")
    assert x.device.index == 1
    with torch.npu.device(1):
        assert torch.npu.current_device() == 1
        assert torch.ones(2, device="npu").device.index == 1
    assert torch.npu.current_device() == 0
    with pytest.raises(RuntimeError, match="found at least two devices, npu:1 and npu:0!"):
        x + torch.ones(2, device="npu:0")
    assert x.to("npu:0").device.index == 0
    with pytest.raises(RuntimeError, match=r"Invalid NPU device ordinal 7: 2 simulated device\(s\) exist"):
        torch.ones(2, device="npu:7")
    with torch.npu.device_of(x):
        assert torch.npu.current_device() == 1


def test_op_counts_name_what_ran() -> None:
    x = torch.ones(2, device="npu")
    with torch_npu.simulation.op_counts() as counts:
        x + x
        torch_npu.npu_swiglu(x)
    assert sum(count for name, count in counts.items() if name.startswith("aten::add.")) == 1
    assert counts["npu::npu_swiglu"] == 1
    assert not any(name.startswith("aten::silu") for name in counts)  # what a fused operator is made of does not count
