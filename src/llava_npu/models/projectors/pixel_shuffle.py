"""Pixel shuffle: a block of patches becomes one token with all their channels, then an MLP.

InternVL 1.5 (Chen et al. 2024, arXiv:2404.16821) by default; `depth: 1, norm: false, bias: false` is the connector of
Idefics3, SmolVLM and nanoVLM (Laurençon et al. 2024, arXiv:2408.12637).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.models.projectors.base import BlockOptions, Projector
from llava_npu.models.projectors.grid import Grid, to_blocks
from llava_npu.models.projectors.layers import Mlp
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class PixelShuffleOptions(BlockOptions):
    """Options of `pixel_shuffle`.

    Attributes:
        scale_factor: side of the block of patches that becomes one token; divides both sides of the grid.
        depth: number of linear layers, with GELU between.
        norm: whether a layer norm comes first.
        bias: whether the linear layers have biases.
    """

    depth: int = 2
    norm: bool = True
    bias: bool = True

    def check(self) -> None:
        self.require_positive("scale_factor", "depth")


@register("pixel_shuffle", PixelShuffleOptions, aliases=("pixelshuffle", "pixel_unshuffle", "internvl"))
class PixelShuffleProjector(Projector):
    """Space to depth, layer norm, MLP. Channels of a token: its patches in row-major order, each with all channels."""

    options: PixelShuffleOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: PixelShuffleOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        shuffled_channels = vision_hidden_size * options.scale_factor**2
        self.norm = nn.LayerNorm(shuffled_channels) if options.norm else nn.Identity()
        self.mlp = Mlp(shuffled_channels, text_hidden_size, options.depth, options.bias)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        blocks = to_blocks(features, grid, self.options.scale_factor)  # (batch, tokens, scale², vision)
        return self.mlp(self.norm(blocks.flatten(2)))
