"""Attention by torch's `scaled_dot_product_attention`: the CPU's implementation, and a GPU's where none fits better."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_npu.ops.attention.lengths import Lengths


def packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Sequence by sequence; in one go where all have one length."""
    if lengths.uniform and lengths.query:
        return _one_length(query, key, value, len(lengths.query), causal, window, scale, dropout)
    sequences = zip(query.split(lengths.query), key.split(lengths.key), value.split(lengths.key), strict=True)
    outs = [_one_length(q, k, v, 1, causal, window, scale, dropout) for q, k, v in sequences if len(q)]
    return torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[-1])


def _one_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: int,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    q, k, v = (rows.unflatten(0, (batch, -1)).transpose(1, 2) for rows in (query, key, value))  # (B, heads, S, D)
    if window is None or window >= k.shape[2]:
        out = batched(q, k, v, causal, scale, dropout)
    else:
        out = masked(q, k, v, band_mask(q.shape[2], k.shape[2], window, q.device), scale, dropout)
    return out.transpose(1, 2).flatten(0, 1)  # (tokens, heads, D)


def batched(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float, dropout: float
) -> torch.Tensor:
    query_length, key_length = query.shape[2], key.shape[2]
    if not causal or query_length == 1:
        return _sdpa(query, key, value, None, False, scale, dropout)
    if query_length == key_length:
        return _sdpa(query, key, value, None, True, scale, dropout)
    # torch's is_causal is aligned at the start, ours at the end.
    mask = band_mask(query_length, key_length, key_length, query.device)
    return masked(query, key, value, mask, scale, dropout)


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, dropout: float
) -> torch.Tensor:
    heads, key_value_heads = query.shape[1], key.shape[1]
    if query.shape[2] > 1 or heads == key_value_heads:
        return _sdpa(query, key, value, mask, False, scale, dropout)
    # One query per head: those that share keys become the rows of one head, so that nothing is repeated.
    rows = query.squeeze(2).unflatten(1, (key_value_heads, -1))  # (B, key_value_heads, group, D)
    if mask.shape[1] == heads:
        mask = mask.squeeze(2).unflatten(1, (key_value_heads, -1))  # (B, key_value_heads, group, S)
    return _sdpa(rows, key, value, mask, False, scale, dropout).flatten(1, 2).unsqueeze(2)


def band_mask(query_length: int, key_length: int, window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, query_length, key_length): causal, aligned at the end, each query seeing its `window` latest keys."""
    every = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    offset = key_length - query_length
    return every.tril(offset).triu(offset - window + 1)[None, None]


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
