"""Rotary position embedding, applied to queries and keys.

Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864), in the half-split arrangement of Llama checkpoints. On an Ascend,
`torch_npu.npu_rotary_mul`. Angles are not made here: base, scaling and positions are the model's own business, and what
it computed arrives as `cos` and `sin`.
"""

from __future__ import annotations

import torch

from llava_npu.ops.planned import kind_of, npu_operators

# The operator's documentation: an even head dimension below 896, fewer than 1000 sequences and heads.
_MAX_HEAD_DIM, _MAX_BATCH = 896, 1000


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x·cos + rotate_half(x)·sin, for both.

    Args:
        query, key: (batch, heads, length, head_dim) with `unsqueeze_dim` 1, (batch, length, heads, head_dim) with 2.
        cos, sin: (batch or 1, length, head_dim), between −1 and 1.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if kind_of(query) == "npu" and all(_operator_takes(tensor, unsqueeze_dim) for tensor in (query, key)):
        # Under autocast the angles come in float32 and the projections in half precision; the operator takes one type.
        return (
            npu_operators().npu_rotary_mul(query, cos.to(query.dtype), sin.to(query.dtype)),
            npu_operators().npu_rotary_mul(key, cos.to(key.dtype), sin.to(key.dtype)),
        )
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _operator_takes(tensor: torch.Tensor, heads_dim: int) -> bool:
    return (
        tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and tensor.shape[-1] % 2 == 0
        and tensor.shape[-1] < _MAX_HEAD_DIM
        and max(tensor.shape[0], tensor.shape[heads_dim]) < _MAX_BATCH
    )


def _rotate_half(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
