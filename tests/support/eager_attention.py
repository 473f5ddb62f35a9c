"""The reference for every attention test: float64, eager, and a mask that is built element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

MayAttend = Callable[[int, int], bool]


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(query·keyᵀ·scale)·value over (batch, heads, length, head_dim); rows that see nothing give zeros."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    sees = mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")).masked_fill(~sees, 0), -1)
    return (weights * sees) @ value


def build_mask(query_length: int, key_length: int, may_attend: MayAttend) -> torch.Tensor:
    """(query_length, key_length); `may_attend(position of the query among the keys, key)`, aligned at the end."""
    offset = key_length - query_length
    rows = [[may_attend(row + offset, column) for column in range(key_length)] for row in range(query_length)]
    return torch.tensor(rows, dtype=torch.bool).reshape(query_length, key_length)


def block_diagonal_mask(
    query_lengths: Sequence[int], key_lengths: Sequence[int], may_attend: MayAttend
) -> torch.Tensor:
    """(tokens, key_tokens): sequences end to end, none sees another."""
    mask = torch.zeros(sum(query_lengths), sum(key_lengths), dtype=torch.bool)
    row = column = 0
    for query_length, key_length in zip(query_lengths, key_lengths, strict=True):
        block = build_mask(query_length, key_length, may_attend)
        mask[row : row + query_length, column : column + key_length] = block
        row, column = row + query_length, column + key_length
    return mask


def assert_equal_to_eager(
    inputs: Sequence[torch.Tensor],
    ours: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    tolerance: float = 2e-6,
) -> None:
    """Compares outputs, and the gradients of their product with one random tensor, with float64 on the CPU."""
    exact_inputs = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out, exact = ours(*inputs), reference(*exact_inputs)
    assert out.shape == exact.shape
    torch.testing.assert_close(out.detach().cpu().double(), exact.detach(), rtol=tolerance, atol=tolerance)
    direction = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact_gradients = torch.autograd.grad(exact, exact_inputs, direction)
    if not out.requires_grad:  # no query saw anything: a constant
        assert not any(expected.any() for expected in exact_gradients)
        return
    gradients = torch.autograd.grad(out, inputs, direction.to(out), allow_unused=True, materialize_grads=True)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.cpu().double(), expected, rtol=tolerance, atol=5 * tolerance)
