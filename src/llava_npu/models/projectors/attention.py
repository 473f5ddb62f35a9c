"""Cross-attention for the projectors that query the features."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from llava_npu.models.projectors.layers import TruncNormalLinear
from llava_npu.ops.attention import batched_attention


class CrossAttention(nn.Module):
    """Multi-head attention with the parameter names and initialisation of `torch.nn.MultiheadAttention`.

    Differs in that tensors are batch-first, that one set of queries or keys may serve the whole batch, and that the
    output projection can be left out altogether, so that a form without it has no dead weights.

    Args:
        channels: width of queries, keys, values and output.
        num_heads: must divide `channels`.
        output_projection: whether the heads' outputs are mixed by a linear layer.
    """

    def __init__(self, channels: int, num_heads: int, output_projection: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * channels))
        self.out_proj = TruncNormalLinear(channels, channels) if output_projection else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what this module itself holds."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends without a mask.

        Args:
            query: (batch or 1, queries, channels).
            key: (batch or 1, keys, channels).
            value: (batch, keys, channels).

        Returns:
            (batch, queries, channels).
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(tensor, weight, bias)
            for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        q, k = (tensor.expand(v.shape[0], -1, -1) for tensor in (q, k))
        merged = split_attention(q, k, v, self.num_heads)
        return merged if self.out_proj is None else self.out_proj(merged)


def split_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention without a mask in `num_heads` equal parts of the channels.

    Args:
        query: (batch, queries, channels).
        key, value: (batch, keys, channels).

    Returns:
        (batch, queries, channels).
    """
    q, k, v = (tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    if torch.compiler.is_compiling():  # it cannot trace how an operation finds its device's implementation
        attended = functional.scaled_dot_product_attention(q, k, v)
    else:
        attended = batched_attention(q, k, v, causal=False)
    return attended.transpose(1, 2).flatten(2)


def default_heads(channels: int, head_size: int) -> int:
    """Heads of `head_size` channels, or fewer and wider ones where that does not divide the width."""
    return next(heads for heads in range(max(1, channels // head_size), 0, -1) if channels % heads == 0)
