"""Reference attention for the tests: torch's scaled_dot_product_attention in float64 on the CPU, told what to keep."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

DENSE = ("BSH", "SBH", "BSND", "BNSD")


def to_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """(batch, heads, length, size) -> layout, contiguous."""
    if layout == "BSH":
        return tensor.transpose(1, 2).flatten(2).contiguous()
    if layout == "SBH":
        return tensor.permute(2, 0, 1, 3).flatten(2).contiguous()
    if layout == "BSND":
        return tensor.transpose(1, 2).contiguous()
    return tensor.contiguous()


def causal(queries: int, keys: int, corner: str) -> torch.Tensor:
    """True = keep, for a diagonal that starts at the top left or ends at the bottom right."""
    shift = 0 if corner == "top left" else keys - queries
    return torch.ones(queries, keys, dtype=torch.bool).tril(shift)


def band(queries: int, keys: int, before: int, after: int) -> torch.Tensor:
    """True = keep: at most `before` positions before and `after` behind the diagonal that ends at the bottom right."""
    shift = keys - queries
    ones = torch.ones(queries, keys, dtype=torch.bool)
    return ones.tril(shift + after) & ones.triu(shift - before)


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """All (batch, heads, length, size)."""
    q, k, v = (tensor.double() for tensor in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale, enable_gqa=True)


def compressed_mask() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).to("npu")
