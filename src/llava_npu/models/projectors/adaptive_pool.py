"""Average pooling to a fixed number of tokens, then the LLaVA-1.5 MLP.

The plainest token reduction there is, and a strong one (Yao et al. 2024, DeCo, arXiv:2405.20985): what LDPv2 does
without its convolution, and with the MLP after the pooling, where it costs a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_npu.models.projectors.base import Projector, SquareOptions
from llava_npu.models.projectors.grid import Grid, average_pool, to_map, to_tokens
from llava_npu.models.projectors.layers import Mlp
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class AdaptivePoolOptions(SquareOptions):
    """Options of `adaptive_pool`."""


@register("adaptive_pool", AdaptivePoolOptions, aliases=("adaptivepool", "adaptive_avg_pool", "deco"))
class AdaptivePoolProjector(Projector):
    """Adaptive average pooling to a square of tokens, then Linear, GELU, Linear."""

    options: AdaptivePoolOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: AdaptivePoolOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.side = options.square_side("num_queries")
        self.mlp = Mlp(vision_hidden_size, text_hidden_size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        pooled = average_pool(to_map(features, grid), (self.side, self.side))  # (batch, vision, side, side)
        return self.mlp(to_tokens(pooled))
