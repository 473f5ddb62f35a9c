"""Reference: torch's own `F.cross_entropy(F.linear(...))` over the full logits."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_npu.ops.linear_cross_entropy import LogitTransform, linear_cross_entropy


def example(
    shape: tuple[int, ...] = (3, 7),
    hidden_size: int = 16,
    vocab_size: int = 53,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    supervised: float = 0.5,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / 4
    offset = torch.randn(vocab_size, generator=generator) if bias else None
    labels = torch.randint(0, vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) >= supervised] = -100
    as_leaf = lambda tensor: tensor.to(device, dtype).requires_grad_()  # noqa: E731
    return as_leaf(hidden), as_leaf(weight), None if offset is None else as_leaf(offset), labels.to(device)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, reduction: str
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor | None) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [tensor for tensor in inputs if tensor is not None]))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_loss_and_gradients_equal_the_plain_way(
    reduction: Literal["sum", "mean"], bias: bool, chunk_size: int, device: torch.device
) -> None:
    hidden, weight, offset, labels = example(bias=bias, device=device)
    ours = linear_cross_entropy(hidden, weight, labels, offset, reduction=reduction, chunk_size=chunk_size)
    theirs = plain(hidden, weight, labels, offset, reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(ours, hidden, weight, offset), gradients(theirs, hidden, weight, offset), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transform", [LogitTransform(0.25), LogitTransform(1.0, 1.5), LogitTransform(0.5, 2.0)])
def test_scaled_and_softly_capped_logits(transform: LogitTransform, device: torch.device) -> None:
    hidden, weight, offset, labels = example(bias=True, device=device)
    ours = linear_cross_entropy(hidden, weight, labels, offset, chunk_size=4, transform=transform)
    logits = transform.scale * F.linear(hidden, weight, offset)
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    theirs = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(ours, hidden, weight, offset), gradients(theirs, hidden, weight, offset), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 20),
    vocab_size=st.integers(2, 40),
    chunk_size=st.integers(1, 25),
    supervised=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_size_in_float64(rows: int, vocab_size: int, chunk_size: int, supervised: float, seed: int) -> None:
    hidden, weight, _, labels = example(
        (rows,), vocab_size=vocab_size, supervised=supervised, seed=seed, dtype=torch.float64
    )
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    theirs = plain(hidden, weight, labels, None, "sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, offset, labels = example((5,), 4, 7, bias=True, dtype=torch.float64)
    assert offset is not None
    torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, b, reduction="mean", chunk_size=2), (hidden, weight, offset)
    )


def test_bfloat16_is_reduced_in_float32(device: torch.device) -> None:
    hidden, weight, _, labels = example((2, 40), dtype=torch.bfloat16, supervised=1.0, device=device)
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=8)
    theirs = plain(hidden, weight, labels, None, "sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grad_hidden, grad_weight = gradients(ours, hidden, weight)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    # Ten chunks added up in bfloat16 would lose more than what one rounding of each chunk and of the sum costs.
    exact = gradients(plain(hidden.double(), weight.double(), labels, None, "sum"), hidden, weight)
    for a, b in zip((grad_hidden, grad_weight), exact, strict=True):
        assert (a.double() - b.double()).norm() / b.double().norm() < 6e-3


def test_autocast_multiplies_in_its_type_and_keeps_float32_gradients(device: torch.device) -> None:
    hidden, weight, _, labels = example(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels, chunk_size=4)
        theirs = plain(hidden, weight, labels, None, "sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    for a, b in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize("padding", [0, 3])
def test_positions_from_the_host(padding: int, device: torch.device) -> None:
    hidden, weight, _, labels = example(device=device)
    flat = labels.flatten().tolist()
    ignored = flat.index(-100)
    positions = torch.tensor([i for i, label in enumerate(flat) if label != -100] + [ignored] * padding)
    searched = linear_cross_entropy(hidden, weight, labels, reduction="mean")
    given_ = linear_cross_entropy(hidden, weight, labels, reduction="mean", positions=positions)
    torch.testing.assert_close(given_, searched, rtol=0, atol=0)
    for a, b in zip(gradients(given_, hidden, weight), gradients(searched, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_nothing_supervised_is_zero_with_zero_gradients(device: torch.device) -> None:
    hidden, weight, _, labels = example(supervised=0.0, device=device)
    for loss in (
        linear_cross_entropy(hidden, weight, labels, reduction="sum"),
        linear_cross_entropy(hidden, weight, labels, reduction="mean"),
    ):
        assert loss.item() == 0
        assert all(not gradient.any() for gradient in gradients(loss, hidden, weight))


def test_extreme_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]))
    torch.testing.assert_close(loss, torch.tensor(2e4))
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


class _Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the shape of every tensor that an operation makes (not of those that merely pass through)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor) and func is not torch.ops.aten.detach.default:
                self.shapes.append(tuple(item.shape))
        return result


def test_frozen_weight_costs_no_weight_gradient_and_logits_are_never_whole() -> None:
    rows, hidden_size, vocab_size, chunk_size = 32, 16, 53, 8
    hidden, weight, _, labels = example((rows,), hidden_size, vocab_size, supervised=1.0)
    weight.requires_grad_(False)
    with _Shapes() as seen:
        linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size).backward()
    assert weight.grad is None
    assert (chunk_size, vocab_size) in seen.shapes
    assert not any(shape == (rows, vocab_size) for shape in seen.shapes)
    assert not any(shape == (vocab_size, hidden_size) for shape in seen.shapes)


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, _, labels = example()
    with torch.no_grad(), _Shapes() as seen:
        loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert (53, 16) not in seen.shapes
    torch.testing.assert_close(loss, plain(hidden, weight, labels, None, "sum").detach())


def test_backward_twice_gives_the_same() -> None:
    hidden, weight, _, labels = example()
    loss = linear_cross_entropy(hidden, weight, labels) * 0.25
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_wrong_arguments_are_named() -> None:
    hidden, weight, _, labels = example()
    with pytest.raises(ValueError, match="reduction 'none'"):
        linear_cross_entropy(hidden, weight, labels, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size 0"):
        linear_cross_entropy(hidden, weight, labels, chunk_size=0)
    with pytest.raises(ValueError, match=r"labels \(21,\)"):
        linear_cross_entropy(hidden, weight, labels.flatten())
