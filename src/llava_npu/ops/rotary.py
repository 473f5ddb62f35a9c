"""Rotary position embedding, applied to queries and keys.

Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864), in the half-split arrangement of Llama checkpoints. On an Ascend,
`torch_npu.npu_rotary_mul`. Angles are not made here: base, scaling and positions are the model's own business, and what
it computed arrives as `cos` and `sin`.
"""

from __future__ import annotations

import torch

from llava_npu.ops import kernels


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x·cos + rotate_half(x)·sin, for both.

    Args:
        query, key: (batch, heads, length, head_dim) with `unsqueeze_dim` 1, (batch, length, heads, head_dim) with 2.
        cos, sin: (batch or 1, length, head_dim), between −1 and 1.
    """
    rotate = kernels.find("rotary", query, formula)
    return rotate(query, key, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), unsqueeze_dim)


def formula(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain torch; `cos` and `sin` have the heads' axis, at `heads_dim`."""
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _rotate_half(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
