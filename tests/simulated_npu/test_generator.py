"""Random numbers of the simulated device come from its own generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

DRAWS = {
    "rand": lambda: torch.rand(8, device="npu"),
    "randn": lambda: torch.randn(8, device="npu"),
    "randint": lambda: torch.randint(0, 1000, (8,), device="npu"),
    "randperm": lambda: torch.randperm(100, device="npu"),
    "multinomial": lambda: torch.multinomial(torch.ones(100, device="npu"), 8),
    "bernoulli": lambda: torch.bernoulli(torch.full((64,), 0.5, device="npu")),
    "normal": lambda: torch.empty(8, device="npu").normal_(),
    "dropout": lambda: nn.functional.dropout(torch.ones(64, device="npu"), 0.5),
    "sdpa": lambda: nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 8, 4, device="npu"), dropout_p=0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_seed_repeats_and_host_generator_is_untouched(draw) -> None:  # type: ignore[no-untyped-def]
    host = torch.get_rng_state()
    torch.npu.manual_seed(1)
    first, second = draw(), draw()
    torch.npu.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), host)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_host_seed_does_not_decide(draw) -> None:  # type: ignore[no-untyped-def]
    torch.npu.manual_seed(1)
    first = draw()
    torch.default_generator.manual_seed(7)  # the CPU's generator only
    torch.npu.manual_seed(1)
    assert torch.equal(draw(), first)


def test_torch_manual_seed_seeds_every_device() -> None:
    torch.manual_seed(3)
    first = [torch.rand(4, device=f"npu:{i}") for i in range(2)]
    torch.manual_seed(3)
    assert all(torch.equal(torch.rand(4, device=f"npu:{i}"), first[i]) for i in range(2))


def test_state_is_saved_and_restored() -> None:
    state = torch.npu.get_rng_state()
    first = torch.rand(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="npu"), first)

    states = torch.npu.get_rng_state_all()
    firsts = [torch.rand(4, device=f"npu:{i}") for i in range(2)]
    torch.npu.set_rng_state_all(states)
    assert all(torch.equal(torch.rand(4, device=f"npu:{i}"), firsts[i]) for i in range(2))


def test_fork_rng_covers_the_device() -> None:
    before = torch.npu.get_rng_state()
    with torch.random.fork_rng(devices=[0], device_type="npu"):
        torch.rand(4, device="npu")
    assert torch.equal(torch.npu.get_rng_state(), before)


def test_generator_object() -> None:
    generator = torch.Generator(device="npu").manual_seed(5)
    assert generator.device.type == "npu"
    first = torch.rand(4, device="npu", generator=generator)
    assert torch.equal(torch.rand(4, device="npu", generator=generator.manual_seed(5)), first)
    assert generator.initial_seed() == 5
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator but found 'cpu'"):
        torch.rand(4, device="npu", generator=torch.Generator())


def test_dropout_keeps_the_mean_and_scales_the_gradient() -> None:
    x = torch.ones(20_000, device="npu", requires_grad=True)
    y = nn.functional.dropout(x, 0.25)
    y.sum().backward()
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert sorted(set(y.tolist())) == pytest.approx([0.0, 4 / 3])
    assert torch.equal(x.grad, y.detach())
