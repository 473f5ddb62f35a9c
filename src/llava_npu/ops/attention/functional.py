"""Attention's one front door: checks, defined results at the edges, and the choice of the device's implementation.

All three functions share these conventions:

- Masks are True where a query may attend to a key, as in `F.scaled_dot_product_attention`.
- Causal means aligned at the end: the last query sees every key, also when a cache holds more keys than there are
  queries.
- A query that may attend to nothing gives zeros, with zero gradients.
- Keys and values may have fewer heads than queries (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245);
  no implementation repeats them.
- `dropout` is the probability of dropping an attention weight.
- Under autocast the inputs are cast to its type, as for torch's own attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from llava_npu.ops.attention.lengths import Lengths
from llava_npu.ops.planned import kind_of


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequence_lengths: Sequence[int],
    causal: bool,
    *,
    key_lengths: Sequence[int] | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
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
        scale: of the scores; 1/√head_dim by default.

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
    query, key, value = _autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    blind = lengths.blind(causal)
    if not any(blind):
        return _implementation(query).packed(query, key, value, lengths, causal, window, scale, dropout)
    seeing = torch.cat([rows[skip:] for rows, skip in zip(query.split(lengths.query), blind, strict=True)])
    out = _implementation(query).packed(
        seeing, key, value, lengths.without_queries(blind), causal, window, scale, dropout
    )
    pieces = []
    for rows, skip in zip(out.split(lengths.without_queries(blind).query), blind, strict=True):
        pieces += [out.new_zeros(skip, *out.shape[1:]), rows]
    return torch.cat(pieces)


def batched_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
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
    query, key, value = _autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query_length, key_length = query.shape[2], key.shape[2]
    blind = query_length if key_length == 0 else max(0, query_length - key_length) if causal else 0
    if blind == query_length:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    out = _implementation(query).batched(query[:, :, blind:], key, value, causal, scale, dropout)
    return torch.nn.functional.pad(out, (0, 0, blind, 0)) if blind else out


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
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
    query, key, value = _autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # A blind query is let see everything and its result is dropped: a softmax over nothing would put NaN in gradients.
    blind = ~mask.any(-1, keepdim=True)  # (batch, heads or 1, query_length, 1)
    out = _implementation(query).masked(query, key, value, mask | blind, scale, dropout)
    return out.masked_fill(blind, 0)


def _check_heads(heads: int, key_value_heads: int) -> None:
    if heads % key_value_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {key_value_heads} key/value heads")


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    kind = tensors[0].device.type
    available = torch.amp.is_autocast_available(kind)  # not for shapes alone, on the meta device
    if not available or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _implementation(query: torch.Tensor) -> ModuleType:
    """The module with `packed`, `batched` and `masked` for the device that holds `query`."""
    kind = kind_of(query)
    if kind == "npu":
        from llava_npu.ops.attention import npu

        return npu
    if kind == "cuda":
        from llava_npu.ops.attention import cuda

        return cuda
    from llava_npu.ops.attention import sdpa

    return sdpa
