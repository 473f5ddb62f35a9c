"""Attention's one front door: checks, defined results at the edges, and the choice of the device's implementation.

All functions share these conventions:

- Masks are True where a query may attend to a key, as in `F.scaled_dot_product_attention`.
- Causal means aligned at the end: the last query sees every key, also when a cache holds more keys than there are
  queries.
- A query that may attend to nothing gives zeros, with zero gradients.
- Keys and values may have fewer heads than queries (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245);
  no implementation repeats them.
- Under autocast the inputs are cast to its type, as for torch's own attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava_npu.ops import kernels
from llava_npu.ops.attention.implementation import AttentionImplementation, AttentionInputs, Scoring
from llava_npu.ops.attention.lengths import Lengths
from llava_npu.ops.attention.sdpa import SDPA

PLAIN = Scoring()


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequence_lengths: Sequence[int],
    causal: bool,
    *,
    key_lengths: Sequence[int] | None = None,
    window: int | None = None,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """Attention within each of several sequences that lie end to end; none sees another.

    Args:
        query: (tokens, heads, head_dim).
        key: (key_tokens, key_value_heads, head_dim).
        value: as `key`; its head_dim may be smaller.
        sequence_lengths: tokens of each sequence, host integers that add up to `tokens`.
        causal: whether a query sees only keys up to its own position.
        key_lengths: keys of each sequence, where they differ from its queries.
        window: with `causal`, the number of latest keys that a query sees, its own included (sliding window).

    Returns:
        (tokens, heads, head_dim of `value`).

    Raises:
        ValueError: lengths that do not add up, head counts that do not divide, or a window without `causal`.
    """
    lengths = Lengths(tuple(sequence_lengths), tuple(sequence_lengths if key_lengths is None else key_lengths))
    lengths.check(query.shape[0], key.shape[0])
    _check_heads(query.shape[1], key.shape[1])
    if window is not None and (not causal or window < 1):
        raise ValueError(f"packed_attention: window {window} with causal={causal}; a window is causal and at least 1")
    inputs = _inputs(query, key, value, scoring)
    dropped = lengths.fully_masked(causal)
    if not any(dropped):
        return _implementation(inputs).packed(inputs, lengths, causal, window)
    query, key, value = inputs.query, inputs.key, inputs.value
    kept = torch.cat([rows[skip:] for rows, skip in zip(query.split(lengths.query), dropped, strict=True)])
    lengths = lengths.without_queries(dropped)
    out = _implementation(inputs).packed(inputs.with_tensors(kept, key, value), lengths, causal, window)
    pieces = []
    for rows, skip in zip(out.split(lengths.query), dropped, strict=True):
        pieces += [out.new_zeros(skip, *out.shape[1:]), rows]
    return torch.cat(pieces)


def batched_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    *,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """Attention over sequences of one length.

    Args:
        query: (batch, heads, query_length, head_dim).
        key: (batch, key_value_heads, key_length, head_dim).
        value: as `key`; its head_dim may be smaller.

    Returns:
        (batch, heads, query_length, head_dim of `value`).
    """
    _check_heads(query.shape[1], key.shape[1])
    inputs = _inputs(query, key, value, scoring)
    query_length, key_length = query.shape[2], key.shape[2]
    fully_masked = query_length if key_length == 0 else max(0, query_length - key_length) if causal else 0
    if fully_masked == query_length:
        return inputs.query.new_zeros(*query.shape[:3], value.shape[-1])
    if fully_masked:
        inputs = inputs.with_tensors(inputs.query[:, :, fully_masked:], inputs.key, inputs.value)
    out = _implementation(inputs).batched(inputs, causal)
    return torch.nn.functional.pad(out, (0, 0, fully_masked, 0)) if fully_masked else out


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """Attention under any boolean mask.

    Args:
        query, key, value: as for `batched_attention`.
        mask: (batch or 1, heads or 1, query_length, key_length), True where a query may attend to a key.

    Returns:
        (batch, heads, query_length, head_dim of `value`).

    Raises:
        ValueError: a mask that is not boolean (an additive one is not guessed at), or head counts that do not divide.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"masked_attention: the mask is {mask.dtype}; a boolean one is needed, True = may attend")
    _check_heads(query.shape[1], key.shape[1])
    inputs = _inputs(query, key, value, scoring)
    # A fully masked query attends to everything and its result is dropped: a softmax over nothing would put NaN in
    # gradients.
    fully_masked = ~mask.any(-1, keepdim=True)  # (batch, heads or 1, query_length, 1)
    out = _implementation(inputs).masked(inputs, mask | fully_masked)
    return out.masked_fill(fully_masked, 0)


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: Sequence[int],
    *,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """Attention of one new token per sequence over a cache of keys and values, of which the first ones are valid.

    Pass the cache as it is stored: slicing it to the longest sequence would make a copy of it on some devices.

    Args:
        query: (batch, heads, 1, head_dim).
        key, value: (batch, key_value_heads, cache_length, head_dim).
        key_lengths: valid keys of each sequence, host integers from 0 to cache_length.
        scoring: without dropout.

    Returns:
        (batch, heads, 1, head_dim of `value`).

    Raises:
        ValueError: more than one query per sequence, or lengths that do not fit.
    """
    key_lengths = tuple(key_lengths)
    if query.shape[2] != 1 or len(key_lengths) != len(query):
        raise ValueError(
            f"cached_attention: {query.shape[2]} queries in each of {len(query)} sequences and {len(key_lengths)} "
            "key_lengths; it takes one query and one length per sequence"
        )
    if not all(0 <= length <= key.shape[2] for length in key_lengths):
        raise ValueError(f"cached_attention: key_lengths {key_lengths} in a cache of {key.shape[2]} positions")
    _check_heads(query.shape[1], key.shape[1])
    inputs = _inputs(query, key, value, scoring)
    if all(key_lengths):
        return _implementation(inputs).cached(inputs, key_lengths)
    if not any(key_lengths):
        return inputs.query.new_zeros(*query.shape[:3], value.shape[-1])
    out = _implementation(inputs).cached(inputs, [max(1, length) for length in key_lengths])
    return torch.where(torch.tensor(key_lengths).to(out.device)[:, None, None, None] > 0, out, 0)


def _check_heads(heads: int, key_value_heads: int) -> None:
    if heads % key_value_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {key_value_heads} key/value heads")


def autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in autocast's type, where it is on."""
    kind = tensors[0].device.type
    available = torch.amp.is_autocast_available(kind)  # not for shapes alone, on the meta device
    if not available or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> AttentionInputs:
    scale = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    query, key, value = autocast(query, key, value)
    return AttentionInputs(query, key, value, scale, scoring.dropout, scoring.softcap)


def _implementation(inputs: AttentionInputs) -> AttentionImplementation:
    default: AttentionImplementation = SDPA
    if inputs.softcap is not None:
        return default
    return kernels.find("attention", inputs.query, default)
