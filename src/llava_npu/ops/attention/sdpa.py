"""Attention by torch's `scaled_dot_product_attention`: for every kind of device that has nothing better."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llava_npu.ops.attention.implementation import AttentionInputs
from llava_npu.ops.attention.lengths import Lengths


class SdpaAttention:
    """The plain implementation; others fall back to it."""

    def packed(self, inputs: AttentionInputs, lengths: Lengths, causal: bool, window: int | None) -> torch.Tensor:
        """Sequence by sequence; in one go where all have one length."""
        query, key, value = inputs.query, inputs.key, inputs.value
        if lengths.uniform and lengths.query:
            return self._one_length(inputs, len(lengths.query), causal, window)
        sequences = zip(query.split(lengths.query), key.split(lengths.key), value.split(lengths.key), strict=True)
        outs = [self._one_length(inputs.with_tensors(*each), 1, causal, window) for each in sequences if len(each[0])]
        return torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[-1])

    def _one_length(self, inputs: AttentionInputs, batch: int, causal: bool, window: int | None) -> torch.Tensor:
        tensors = (inputs.query, inputs.key, inputs.value)
        q, k, v = (rows.unflatten(0, (batch, -1)).transpose(1, 2) for rows in tensors)  # (B, heads, S, D)
        dense = inputs.with_tensors(q, k, v)
        if window is None or window >= k.shape[2]:
            out = self.batched(dense, causal)
        else:
            out = self.masked(dense, band_mask(q.shape[2], k.shape[2], window, q.device))
        return out.transpose(1, 2).flatten(0, 1)  # (tokens, heads, D)

    def batched(self, inputs: AttentionInputs, causal: bool) -> torch.Tensor:
        query_length, key_length = inputs.query.shape[2], inputs.key.shape[2]
        if not causal or query_length == 1:
            return _sdpa(inputs)
        if query_length == key_length:
            return _sdpa(inputs, is_causal=True)
        # torch's is_causal is aligned at the start, ours at the end.
        return self.masked(inputs, band_mask(query_length, key_length, key_length, inputs.query.device))

    def masked(self, inputs: AttentionInputs, mask: torch.Tensor) -> torch.Tensor:
        query = inputs.query
        heads, key_value_heads = query.shape[1], inputs.key.shape[1]
        if query.shape[2] > 1 or heads == key_value_heads:
            return _sdpa(inputs, mask)
        # One query per head: those that share keys become the rows of one head, so that nothing is repeated.
        rows = query.squeeze(2).unflatten(1, (key_value_heads, -1))  # (B, key_value_heads, group, D)
        if mask.shape[1] == heads:
            mask = mask.squeeze(2).unflatten(1, (key_value_heads, -1))  # (B, key_value_heads, group, S)
        return _sdpa(inputs.with_tensors(rows, inputs.key, inputs.value), mask).flatten(1, 2).unsqueeze(2)

    def cached(self, inputs: AttentionInputs, key_lengths: Sequence[int]) -> torch.Tensor:
        longest = max(key_lengths)
        visible = inputs.with_tensors(inputs.query, inputs.key[:, :, :longest], inputs.value[:, :, :longest])
        if min(key_lengths) == longest:
            return self.batched(visible, causal=False)
        return self.masked(visible, lengths_mask(key_lengths, longest, inputs.query.device))


def band_mask(query_length: int, key_length: int, window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, query_length, key_length): causal, aligned at the end, each query seeing its `window` latest keys."""
    every = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    offset = key_length - query_length
    return every.tril(offset).triu(offset - window + 1)[None, None]


def lengths_mask(key_lengths: Sequence[int], key_length: int, device: torch.device) -> torch.Tensor:
    """(batch, 1, 1, key_length): True for the first `key_lengths` keys of each sequence."""
    lengths = torch.tensor(key_lengths).to(device, non_blocking=True)
    return torch.arange(key_length, device=device) < lengths[:, None, None, None]


def _sdpa(inputs: AttentionInputs, mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
    if inputs.softcap is not None:
        return _capped(inputs, inputs.softcap, mask, is_causal)
    return F.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        mask,
        inputs.dropout,
        is_causal,
        scale=inputs.scale,
        enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
    )


def _capped(inputs: AttentionInputs, cap: float, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """Softly capped scores, which torch's operator does not have; holds all of them, (batch, heads, queries, keys)."""
    query, key, value = inputs.query, inputs.key, inputs.value
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.tanh(query @ key.transpose(-1, -2) * (inputs.scale / cap)) * cap
    if is_causal:
        mask = band_mask(query.shape[2], key.shape[2], key.shape[2], query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(value.dtype)
    return F.dropout(weights, inputs.dropout) @ value


SDPA = SdpaAttention()
