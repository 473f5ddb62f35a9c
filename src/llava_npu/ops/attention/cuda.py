"""Attention on NVIDIA GPUs: torch's variable-length kernel for sequences of several lengths, SDPA otherwise.

Source: `torch.nn.attention.varlen`, which calls FlashAttention (Dao 2023, arXiv:2307.08691); its causal mask is aligned
at the end.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from llava_npu.ops.attention import sdpa
from llava_npu.ops.attention.lengths import Lengths
from llava_npu.ops.attention.sdpa import masked

__all__ = ["batched", "masked", "packed"]


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
    varlen = _varlen_for(query, key, value, dropout)
    square = lengths.query == lengths.key
    if varlen is None or not any(lengths.query) or (lengths.uniform and window is None and (square or not causal)):
        return sdpa.packed(query, key, value, lengths, causal, window, scale, dropout)
    out: torch.Tensor = varlen(
        query,
        key,
        value,
        _boundaries(lengths.cumulative_query, query.device),
        _boundaries(lengths.cumulative_key, query.device),
        max(lengths.query),
        max(lengths.key),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


def batched(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float, dropout: float
) -> torch.Tensor:
    batch, _, query_length, _ = query.shape
    key_length = key.shape[2]
    if not causal or query_length in (1, key_length) or _varlen_for(query, key, value, dropout) is None:
        return sdpa.batched(query, key, value, causal, scale, dropout)
    # SDPA would need a mask here (a chunk of a prompt behind a cache), and with it no fast kernel.
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (tokens, heads, D)
    lengths = Lengths((query_length,) * batch, (key_length,) * batch)
    out = packed(q, k, v, lengths, causal, None, scale, dropout)
    return out.unflatten(0, (batch, query_length)).transpose(1, 2)


def _varlen_for(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float
) -> Callable[..., Any] | None:
    """torch's variable-length attention, if this torch, GPU and input have it."""
    fits = (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and dropout == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
    return _varlen() if fits else None


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    # torch 2.10 has it without windows, scale and grouped heads.
    has = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= has.keys() else None


@functools.lru_cache(maxsize=16)
def _boundaries(cumulative: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Cumulative lengths with the leading 0, copied to the device once for all layers of a forward pass."""
    with torch.inference_mode(False):  # a tensor born in inference mode could not take part in training later
        return torch.tensor((0, *cumulative), dtype=torch.int32).to(device, non_blocking=True)
