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

from llava_npu.ops.attention.implementation import AttentionInputs
from llava_npu.ops.attention.lengths import Lengths
from llava_npu.ops.attention.sdpa import SdpaAttention
from llava_npu.ops.kernels import register


class CudaAttention(SdpaAttention):
    """SDPA, but without a loop over sequences and without masks where a variable-length kernel will do."""

    def packed(self, inputs: AttentionInputs, lengths: Lengths, causal: bool, window: int | None) -> torch.Tensor:
        query = inputs.query
        varlen = _varlen_for(inputs)
        square = lengths.query == lengths.key
        if varlen is None or not any(lengths.query) or (lengths.uniform and window is None and (square or not causal)):
            return super().packed(inputs, lengths, causal, window)
        out: torch.Tensor = varlen(
            query,
            inputs.key,
            inputs.value,
            _boundaries(lengths.cumulative_query, query.device),
            _boundaries(lengths.cumulative_key, query.device),
            max(lengths.query),
            max(lengths.key),
            scale=inputs.scale,
            window_size=(-1 if window is None else window - 1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != inputs.key.shape[1],
        )
        return out

    def batched(self, inputs: AttentionInputs, causal: bool) -> torch.Tensor:
        batch, _, query_length, _ = inputs.query.shape
        key_length = inputs.key.shape[2]
        if not causal or query_length in (1, key_length) or _varlen_for(inputs) is None:
            return super().batched(inputs, causal)
        # SDPA would need a mask here (a chunk of a prompt behind a cache), and with it no fast kernel.
        tensors = (inputs.query, inputs.key, inputs.value)
        rows = inputs.with_tensors(*(tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors))  # (tokens, heads, D)
        out = self.packed(rows, Lengths((query_length,) * batch, (key_length,) * batch), causal, None)
        return out.unflatten(0, (batch, query_length)).transpose(1, 2)


register("attention", "cuda")(CudaAttention())


def _varlen_for(inputs: AttentionInputs) -> Callable[..., Any] | None:
    """torch's variable-length attention, if this torch, GPU and input have it."""
    query = inputs.query
    fits = (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == inputs.value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and inputs.dropout == 0
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
