"""The deterministic fill behind `tests/golden/projectors.json`: weights and inputs as a hash of their position."""

from __future__ import annotations

import math

import numpy as np
import torch

STATE_DICT_LIKE = dict[str, tuple[int, ...]]


def uniform(numel: int, k: int) -> torch.Tensor:
    """`numel` float64 values in [−1, 1), a function of the index and of the tensor's number k."""
    with np.errstate(over="ignore"):
        h = np.arange(numel, dtype=np.uint32) + np.uint32((1 + 1_000_003 * k) % 2**32)
        h *= np.uint32(2_654_435_761)
        h ^= h >> np.uint32(16)
        h *= np.uint32(2_246_822_519)
        h ^= h >> np.uint32(13)
    return torch.from_numpy(h.astype(np.float64)).div_(2**31).sub_(1)


def fill(shapes: STATE_DICT_LIKE) -> dict[str, torch.Tensor]:
    """Weights for keys in the predecessor's names; its fixed `pos_embed` is neither filled nor counted."""
    keys = [key for key in sorted(shapes) if key != "pos_embed"]
    return {key: _tensor(key, tuple(shapes[key]), k) for k, key in enumerate(keys)}


def features(*shape: int, k: int = 1000) -> torch.Tensor:
    """Input features with unit variance."""
    return uniform(math.prod(shape), k).mul_(math.sqrt(3)).reshape(shape)


def _tensor(key: str, shape: tuple[int, ...], k: int) -> torch.Tensor:
    values = uniform(math.prod(shape), k).reshape(shape)
    if key in ("query", "pos_emb"):
        return values
    if len(shape) >= 2:
        return values.mul_(math.sqrt(3 * shape[0] / math.prod(shape)))
    return values.mul_(0.1).add_(1) if key.endswith(".weight") else values.mul_(0.1)
