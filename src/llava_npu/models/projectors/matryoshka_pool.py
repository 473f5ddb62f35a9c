"""Matryoshka multimodal models (M3): the LLaVA-1.5 MLP, averaged over blocks of several sizes (Cai et al. 2024).

arXiv:2405.17430; mu-cai/matryoshka-mm, `llava_arch.py` at ec30cd3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava_npu.models.projectors.base import NestedOptions, NestedProjector
from llava_npu.models.projectors.grid import Grid, average_pool, to_map, to_tokens
from llava_npu.models.projectors.layers import Mlp
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class MatryoshkaPoolOptions(NestedOptions):
    """Options of `matryoshka_pool`.

    Attributes:
        tokens: how many tokens come out, one for each block of s×s patches where s divides the grid; None: one for each
            patch.
    """

    def token_choices(self, grid: Grid) -> Sequence[int]:
        height, width = grid
        common = math.gcd(height, width)
        return [height * width // side**2 for side in range(common, 0, -1) if common % side == 0]

    def token_grid(self, grid: Grid) -> Grid | None:
        side = math.isqrt(grid[0] * grid[1] // self.num_tokens(grid))
        return grid[0] // side, grid[1] // side


@register("matryoshka_pool", MatryoshkaPoolOptions, aliases=("m3", "matryoshka", "matryoshka_mm"))
class MatryoshkaPoolProjector(NestedProjector):
    """Linear, GELU, Linear on every patch, then the mean of each block."""

    options: MatryoshkaPoolOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: MatryoshkaPoolOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.mlp = Mlp(vision_hidden_size, text_hidden_size)

    def nested(self, features: torch.Tensor, grid: Grid, widths: Sequence[int]) -> list[torch.Tensor]:
        projected = to_map(self.mlp(features), grid)  # (batch, text, height, width)
        sides = [math.isqrt(grid[0] * grid[1] // width) for width in widths]
        return [to_tokens(average_pool(projected, (grid[0] // side, grid[1] // side))) for side in sides]
