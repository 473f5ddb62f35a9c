"""Patch grids: from a row of tokens to a map and back, and pooling a map to a smaller one.

A grid is `(height, width)` in patches. Patch tokens come in row-major order, without class or register tokens.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from llava_npu.errors import UserError

Grid = tuple[int, int]


def as_grid(grid: object) -> Grid:
    """Checks that `grid` is a pair of positive integers, (height, width), and returns it as a tuple."""
    pair = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
    if len(pair) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in pair):
        raise UserError(f"A patch grid is (height, width), two positive whole numbers; got {grid!r}.")
    return pair


def infer_grid(num_tokens: int, projector: str) -> Grid:
    """The square grid with this many tokens.

    Raises:
        UserError: `num_tokens` is not a square number, so that the grid has to be given.
    """
    side = math.isqrt(num_tokens)
    if side * side == num_tokens:
        return side, side
    extra = num_tokens - side * side
    raise UserError(
        f"Projector {projector!r} got {num_tokens} tokens, which form no square grid. Give grid=(height, width)"
        f" if the patches form another rectangle; if there are class or register tokens among them"
        f" ({side}×{side} patches and {extra} more?), select patch tokens only (vision_feature_select_strategy"
        f" 'patch')."
    )


def to_map(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(batch, height·width, channels) → (batch, channels, height, width), a view in channels-last memory order."""
    batch, _, channels = tokens.shape
    return tokens.reshape(batch, *grid, channels).permute(0, 3, 1, 2)


def to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """(batch, channels, height, width) → (batch, height·width, channels)."""
    return feature_map.flatten(2).transpose(1, 2)


def average_pool(feature_map: torch.Tensor, size: Grid) -> torch.Tensor:
    """Adaptive average pooling to `size`: (batch, channels, h, w) → (batch, channels, *size).

    Equals `torch.nn.AdaptiveAvgPool2d(size)`. Where the windows tile the map it is a plain mean, whose backward pass is
    deterministic on every device; torch's adaptive backward is not on CUDA. Elsewhere (27 → 12) windows overlap.
    """
    batch, channels, height, width = feature_map.shape
    rows, columns = size
    if height % rows or width % columns:
        return functional.adaptive_avg_pool2d(feature_map, size)
    windows = feature_map.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return windows.mean(dim=(3, 5))


def to_blocks(tokens: torch.Tensor, grid: Grid, scale: int) -> torch.Tensor:
    """Cuts the map into scale×scale blocks: (batch, h·w, channels) → (batch, h/scale · w/scale, scale², channels).

    Blocks, and the tokens in a block, are in row-major order. `scale` must divide both sides of the grid.
    """
    batch, _, channels = tokens.shape
    rows, columns = grid[0] // scale, grid[1] // scale
    split = tokens.reshape(batch, rows, scale, columns, scale, channels)
    return split.transpose(2, 3).reshape(batch, rows * columns, scale * scale, channels)


def from_blocks(blocks: torch.Tensor, grid: Grid, scale: int) -> torch.Tensor:
    """Undoes `to_blocks`: (batch, blocks, scale², channels) → (batch, blocks · scale², channels).

    Args:
        grid: (rows, columns) of blocks, not of tokens.
    """
    return blocks.unflatten(2, (scale, scale)).unflatten(1, grid).transpose(2, 3).flatten(1, 4)


def require_divisible(grid: Grid, scale: int, projector: str) -> None:
    """Raises UserError, naming what would work, unless `scale` divides both sides of the grid."""
    height, width = grid
    if height % scale == 0 and width % scale == 0:
        return
    common = math.gcd(height, width)
    factors = [factor for factor in range(2, common + 1) if common % factor == 0]
    works = f"scale_factor {' or '.join(map(str, factors))}" if factors else "no scale_factor but 1"
    rounded = " or ".join(f"{h}×{w}" for h, w in _nearest_grids(grid, scale))
    raise UserError(
        f"Projector {projector!r} cannot cut a grid of {height}×{width} patches into {scale}×{scale} blocks"
        f" (scale_factor={scale}). For this grid {works} works; for this scale_factor, grids whose sides are multiples"
        f" of {scale}, such as {rounded}."
    )


def _nearest_grids(grid: Grid, scale: int) -> list[Grid]:
    """The grid rounded down and up to multiples of `scale`."""
    down = (grid[0] // scale * scale, grid[1] // scale * scale)
    up = (-(-grid[0] // scale) * scale, -(-grid[1] // scale) * scale)
    return [down, up] if min(down) > 0 else [up]
