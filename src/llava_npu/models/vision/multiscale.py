"""S²: one tower at several scales, with more channels and no more tokens.

An image is seen whole at the tower's own size and again enlarged, cut into tiles of that size; each scale's tiles are
put together again, averaged down to the grid of one tile and concatenated on channels (Shi et al. 2024, "When Do We Not
Need Larger Vision Models?", arXiv:2403.13043; here as in LLaVA with S²: the image comes at the largest scale).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.nn import functional as F

from llava_npu.errors import UserError
from llava_npu.models.projectors.grid import Grid, average_pool, to_map, to_tokens

# (images, 3, height, width) → of each layer (images, special tokens + patches, channels)
Encode = Callable[[torch.Tensor], list[torch.Tensor]]


def check_scales(scales: Sequence[int]) -> None:
    """Raises `UserError` unless the scales are 1 and larger whole numbers in rising order."""
    whole = all(isinstance(scale, int) and not isinstance(scale, bool) for scale in scales)
    if not scales or not whole or scales[0] != 1 or any(a >= b for a, b in pairwise(scales)):
        raise UserError(
            f"scales {list(scales)}: they are whole multiples of the tower's image size, rising from 1, as in [1, 2] "
            "or [1, 2, 3]."
        )


def multiscale_features(
    encode: Encode, pixel_values: torch.Tensor, scales: Sequence[int], grid: Grid, num_special_tokens: int
) -> list[torch.Tensor]:
    """Runs a tower at several scales.

    Args:
        encode: the tower, for images of its own size.
        pixel_values: (images, 3, height, width), at the largest scale.
        scales: see `check_scales`.
        grid: (rows, columns) of the tower's patches.
        num_special_tokens: tokens that `encode` gives before the patches; they are averaged over a scale's tiles.

    Returns:
        of each layer (images, special tokens + patches, scales × channels).
    """
    height, width = (side // scales[-1] for side in pixel_values.shape[-2:])
    by_scale = []
    for scale in scales:
        image = pixel_values
        if scale != scales[-1]:
            size = (height * scale, width * scale)
            image = F.interpolate(pixel_values.float(), size=size, mode="bicubic").to(pixel_values.dtype)
        layers = encode(_cut(image, scale))
        by_scale.append([_join(layer, scale, grid, num_special_tokens) for layer in layers])
    return [torch.cat(of_layer, dim=-1) for of_layer in zip(*by_scale, strict=True)]


def _cut(batch: torch.Tensor, scale: int) -> torch.Tensor:
    """(images, 3, scale·height, scale·width) → (scale² · images, 3, height, width), row by row of tiles."""
    images, channels, height, width = batch.shape
    tiles = batch.reshape(images, channels, scale, height // scale, scale, width // scale)
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def _join(tokens: torch.Tensor, scale: int, grid: Grid, num_special_tokens: int) -> torch.Tensor:
    """(scale² · images, special + patches, channels) → (images, special + patches, channels)."""
    if scale == 1:
        return tokens
    rows, columns = grid
    special, patches = tokens[:, :num_special_tokens], tokens[:, num_special_tokens:]
    channels = patches.shape[-1]
    tiles = to_map(patches, grid).reshape(scale, scale, -1, channels, rows, columns)
    whole = tiles.permute(2, 3, 0, 4, 1, 5).reshape(-1, channels, scale * rows, scale * columns)
    pooled = to_tokens(average_pool(whole.float(), grid).to(tokens.dtype))
    averaged = special.unflatten(0, (scale * scale, -1)).mean(0)
    return torch.cat([averaged, pooled], dim=1)
