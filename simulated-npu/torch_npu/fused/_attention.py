"""Attention as arithmetic: layouts, masks, softmax. What a call may ask for is decided by the operators."""

from __future__ import annotations

import torch

COMPRESSED_MASK_SIZE = 2048


def split_heads(tensor: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """Any dense layout -> (batch, heads, length, head size)."""
    if layout == "BSH":
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
    if layout == "SBH":
        return tensor.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    if layout == "BSND":
        return tensor.transpose(1, 2)
    return tensor  # BNSD


def join_heads(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """(batch, heads, length, head size) -> the layout of the call, contiguous."""
    if layout == "BSH":
        return tensor.transpose(1, 2).flatten(2)
    if layout == "SBH":
        return tensor.permute(2, 0, 1, 3).flatten(2)
    if layout == "BSND":
        return tensor.transpose(1, 2).contiguous()
    return tensor.contiguous()


def outside_band(
    rows: torch.Tensor, columns: torch.Tensor, before: int, after: int, shift: int | torch.Tensor = 0
) -> torch.Tensor:
    """True where a key lies more than `before` positions before, or `after` behind, the query's own.

    The diagonal starts at the top left; `shift` = key length - query length moves it to end at the bottom right.
    """
    distance = columns - rows - shift
    return (distance > after) | (distance < -before)


def compressed_mask(device: torch.device) -> torch.Tensor:
    """The one mask that sparse modes 2, 3 and 4 take, whatever the lengths. True = masked."""
    ones = torch.ones(COMPRESSED_MASK_SIZE, COMPRESSED_MASK_SIZE, dtype=torch.bool, device=device)
    return ones.triu(diagonal=1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masked: torch.Tensor | None,
    scale: float,
    keep_prob: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(scale · query · keyᵀ, masked) · value in float32, and the softmax's row maxima and sums.

    query: (batch, heads, queries, size); key, value: (batch, key heads, keys, size), heads a multiple of key heads;
    masked: broadcast to (batch, heads, queries, keys), True = masked. A row with everything masked gives zeros.
    Returns the output in the dtype of `value`, maxima and sums as (batch, heads, queries, 1).
    """
    groups = query.shape[1] // key.shape[1]
    key, value32 = (t.float().repeat_interleave(groups, dim=1, output_size=query.shape[1]) for t in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * scale  # (batch, heads, queries, keys)
    empty_rows = None
    if masked is not None:
        masked = masked.expand_as(scores)
        scores = scores.masked_fill(masked, torch.finfo(torch.float32).min)
        empty_rows = masked.all(dim=-1, keepdim=True)
    weights = scores.softmax(dim=-1)
    if keep_prob < 1:
        weights = torch.dropout(weights, 1 - keep_prob, True)
    output = weights @ value32
    if empty_rows is not None:
        output = output.masked_fill(empty_rows, 0.0)
    maxima = scores.detach().amax(dim=-1, keepdim=True)
    sums = (scores.detach() - maxima).exp().sum(dim=-1, keepdim=True)
    return output.to(value.dtype), maxima, sums
