"""Rotary position embedding, applied to queries and keys.

Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864), in the half-split arrangement of Llama checkpoints, or in the
paper's own, of neighbouring channels (GLM, Cohere). On an Ascend, `torch_npu.npu_rotary_mul`. Angles are not made here:
base, scaling and positions are the model's own business, and what it computed arrives as `cos` and `sin`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llava_npu.ops import kernels


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x·cos + rotated(x)·sin, for both; the first half of the channels is paired with the second.

    Args:
        query, key: (batch, heads, length, head_dim) with `unsqueeze_dim` 1, (batch, length, heads, head_dim) with 2.
        cos, sin: (batch or 1, length, rotary_dim), between −1 and 1. Channels from `rotary_dim` on stay as they are.
    """
    rotate = kernels.find("rotary", query, formula)
    return _partly(rotate, query, key, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), unsqueeze_dim)


def apply_neighbour_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `apply_rotary`, but each even channel is paired with the next one."""
    rotate = kernels.find("neighbour_rotary", query, neighbour_formula)
    return _partly(rotate, query, key, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), unsqueeze_dim)


def apply_repeated_neighbour_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `apply_neighbour_rotary`, of angles that come in the half-split arrangement, as GLM's do."""
    cos, sin = (angles[..., : angles.shape[-1] // 2].repeat_interleave(2, dim=-1) for angles in (cos, sin))
    return apply_neighbour_rotary(query, key, cos, sin, unsqueeze_dim)


Rotation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def _partly(
    rotate: Rotation, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the channels that there are angles for."""
    size = cos.shape[-1]
    if size == query.shape[-1]:
        return rotate(query, key, cos, sin, heads_dim)
    rotated = rotate(query[..., :size], key[..., :size], cos, sin, heads_dim)
    whole = zip(rotated, (query, key), strict=True)
    new_query, new_key = (torch.cat((part.to(old.dtype), old[..., size:]), dim=-1) for part, old in whole)
    return new_query, new_key


def formula(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain torch; `cos` and `sin` have the heads' axis, at `heads_dim`."""
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def neighbour_formula(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """In plain torch; `cos` and `sin` have the heads' axis, at `heads_dim`."""
    return query * cos + _rotate_neighbours(query) * sin, key * cos + _rotate_neighbours(key) * sin


def _rotate_half(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_neighbours(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack((-tensor[..., 1::2], tensor[..., 0::2]), dim=-1).flatten(-2)
