"""Lightweight downsample projector of MobileVLM V2 (Chu et al. 2024, arXiv:2402.03766; Meituan-AutoML/MobileVLM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.models.projectors.base import Projector, SquareOptions
from llava_npu.models.projectors.grid import Grid, average_pool, to_map, to_tokens
from llava_npu.models.projectors.layers import Mlp
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class LdpV2Options(SquareOptions):
    """Options of `ldpv2`."""


@register("ldpv2", LdpV2Options, aliases=("ldp_v2", "ldpnetv2", "ldpnet_v2"))
class LdpV2Projector(Projector):
    """MLP per patch, average pooling to a square of tokens, then a depthwise 3×3 convolution that gives position.

    The convolution is the positional encoding generator (PEG) of Chu et al. 2021, arXiv:2102.10882: it is added to its
    input, and its zero padding tells border from centre.
    """

    options: LdpV2Options

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: LdpV2Options) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.side = options.square_side("num_queries")
        self.mlp = Mlp(vision_hidden_size, text_hidden_size)
        self.peg = nn.Conv2d(text_hidden_size, text_hidden_size, kernel_size=3, padding=1, groups=text_hidden_size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        patches = to_map(self.mlp(features), grid)  # (batch, text, height, width)
        pooled = average_pool(patches, (self.side, self.side))  # (batch, text, side, side)
        return to_tokens(self.peg(pooled) + pooled)
