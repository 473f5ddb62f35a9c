"""Lightweight downsample projector of MobileVLM V1 (Chu et al. 2023, arXiv:2312.16886; Meituan-AutoML/MobileVLM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from llava_npu.models.projectors.base import Projector, ProjectorOptions
from llava_npu.models.projectors.grid import Grid, to_map, to_tokens
from llava_npu.models.projectors.layers import LayerNorm2d, Mlp, SqueezeExcite
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class LdpOptions(ProjectorOptions):
    """`ldp` has no options: it halves both sides of the grid."""

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        height, width = self.patches_only(grid, special_tokens)
        return -(-height // 2) * -(-width // 2)

    def token_grid(self, grid: Grid) -> Grid | None:
        return -(-grid[0] // 2), -(-grid[1] // 2)


@register("ldp", LdpOptions, aliases=("ldpv1", "ldp_v1", "ldpnet", "ldpnetv1"))
class LdpProjector(Projector):
    """MLP per patch, then two depthwise-separable blocks, the second with stride 2."""

    options: LdpOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: LdpOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.mlp = Mlp(vision_hidden_size, text_hidden_size)
        self.block_1 = SeparableBlock(text_hidden_size, stride=1)
        self.block_2 = SeparableBlock(text_hidden_size, stride=2)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        patches = to_map(self.mlp(features), grid)  # (batch, text, height, width)
        patches = patches + self.block_1(patches)
        return to_tokens(self.block_2(patches))  # (batch, ⌈height/2⌉·⌈width/2⌉, text)


class SeparableBlock(nn.Module):
    """MobileNetV3's inverted residual with expansion 1 and layer norms (Howard et al. 2019, arXiv:1905.02244).

    Depthwise 3×3, norm, hard swish; squeeze and excitation; pointwise, norm. The caller adds the residual.
    (batch, channels, height, width) → (batch, channels, ⌈height/stride⌉, ⌈width/stride⌉).
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.depthwise_norm = LayerNorm2d(channels)
        self.squeeze_excite = SqueezeExcite(
            channels, round_to_eight(channels // 4), functional.relu, functional.hardsigmoid
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_norm = LayerNorm2d(channels)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        hidden = functional.hardswish(self.depthwise_norm(self.depthwise(feature_map)))
        return self.pointwise_norm(self.pointwise(self.squeeze_excite(hidden)))


def round_to_eight(channels: int) -> int:
    """MobileNet's rounding of a channel count to a multiple of 8 that loses no more than a tenth."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
