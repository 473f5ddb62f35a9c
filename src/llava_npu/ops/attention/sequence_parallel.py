"""Attention over sequences that are split over several processes: all-to-all from parts of the sequence to heads.

Each process has a part of every sequence, with all heads. Before attention they exchange queries, keys and values, so
that each has the whole sequences with a part of the heads, and attends as one device would, packs and windows included.
Afterwards results go back the same way. Nothing is approximated: only where a number is computed changes.

Source: Jacobs et al. 2023, DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# What attends: (tokens, heads, head_dim) of query, key and value -> (tokens, heads, head_dim of value).
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def split_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup, attend: Attend
) -> torch.Tensor:
    """Attends over whole sequences, of which each process of `group` has an equal part, in the order of their ranks.

    Where there are fewer key and value heads than processes, or they do not divide, each is sent to as many processes
    as need it.

    Args:
        query: (batch, heads, part of the length, head_dim).
        key, value: the same with key_value_heads.
        attend: gets all tokens, row after row, and this process's share of the heads.

    Returns:
        (batch, part of the length, heads, head_dim of `value`).

    Raises:
        ValueError: the heads do not divide over the processes.
    """
    parts = group.size()
    batch, heads, length, _ = query.shape
    if heads % parts:
        raise ValueError(f"sequence parallel: {heads} attention heads do not divide over {parts} processes")
    copies = math.lcm(key.shape[1], parts) // key.shape[1]
    if copies > 1:
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
    tensors = (query, key, value)
    sent = torch.cat([_by_heads(tensor, parts) for tensor in tensors], dim=-1)
    received = _exchange(sent, group)  # (part of the length, batch, tokens, share of heads × head_dim)
    rows = received.transpose(0, 1).reshape(batch * parts * length, -1)
    widths = [tensor.shape[1] // parts * tensor.shape[3] for tensor in tensors]
    q, k, v = (
        flat.unflatten(1, (-1, tensor.shape[3])) for flat, tensor in zip(rows.split(widths, 1), tensors, strict=True)
    )
    out = attend(q, k, v).reshape(batch, parts, length, -1)  # last: share of heads × head_dim
    back = _exchange(out.transpose(0, 1), group)  # (part of the heads, batch, tokens, share of heads × head_dim)
    return back.permute(1, 2, 0, 3).reshape(batch, length, heads, -1)


def _by_heads(tensor: torch.Tensor, parts: int) -> torch.Tensor:
    """(batch, heads, length, head_dim) -> (part of the heads, batch, length, share of heads × head_dim)."""
    return tensor.unflatten(1, (parts, -1)).permute(1, 0, 3, 2, 4).flatten(3)


def _exchange(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sends `parts[i]` to the i-th process; the result's i-th part came from there."""
    exchanged: torch.Tensor = _AllToAll.apply(parts, group)
    return exchanged


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient, ctx.group), None
