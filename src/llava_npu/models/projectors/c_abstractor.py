"""C-Abstractor of Honeybee: residual convolutions around a pooling.

Cha et al. 2023, arXiv:2312.06742; khanrc/honeybee.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from llava_npu.models.projectors.base import PositionedOptions, Projector
from llava_npu.models.projectors.grid import Grid, average_pool, to_map, to_tokens
from llava_npu.models.projectors.layers import LayerNorm2d, Mlp, NormalConv2d, NormalLinear, SqueezeExcite
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class CAbstractorOptions(PositionedOptions):
    """Options of `c_abstractor`; the defaults are Honeybee's geometry for CLIP-L at 336 pixels.

    Attributes:
        hidden_size: channels of the convolutions.
        num_queries: tokens out, a square number.
        num_input_tokens: patches in, one learned position each.
        depth: residual blocks before the pooling, and again after it; 0 leaves pooling and read-out alone.
    """

    depth: int = 3

    def check(self) -> None:
        super().check()
        if self.depth < 0:
            raise self.error("depth", "must not be negative")


@register(
    "c_abstractor",
    CAbstractorOptions,
    aliases=("c_abs", "cabs", "cabstractor", "abs", "abstract", "abstractor", "honeybee"),
)
class CAbstractorProjector(Projector):
    """Learned positions, residual blocks, pooling to a square of tokens, residual blocks, two-layer read-out.

    Honeybee initialises convolutions and linear layers from N(0, 0.02²) with zero biases, positions truncated.
    """

    options: CAbstractorOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: CAbstractorOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        hidden = options.hidden_size if options.depth else vision_hidden_size
        self.side = options.square_side("num_queries")
        self.pos_emb = nn.Parameter(torch.empty(1, options.num_input_tokens, vision_hidden_size))
        self.stage_1 = residual_stage(vision_hidden_size, hidden, options.depth)
        self.stage_2 = residual_stage(hidden, hidden, options.depth)
        self.readout = Mlp(hidden, text_hidden_size, activation=functional.silu, linear=NormalLinear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what this module itself holds."""
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        patches = self.stage_1(to_map(features + self.pos_emb, grid))  # (batch, hidden, height, width)
        pooled = average_pool(patches, (self.side, self.side))  # (batch, hidden, side, side)
        return self.readout(to_tokens(self.stage_2(pooled)))


def residual_stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    """`depth` residual blocks; the first one changes the width."""
    widths = [in_channels] + [channels] * (depth - 1)
    return nn.Sequential(*(ResidualBlock(width, channels) for width in widths[:depth]))


class ResidualBlock(nn.Module):
    """RegNet-Y's bottleneck with ratio 1, depthwise, with layer norms (Radosavovic et al. 2020, arXiv:2003.13678).

    1×1, depthwise 3×3, squeeze and excitation, 1×1, shortcut, SiLU.
    (batch, in_channels, height, width) → (batch, channels, height, width).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv_1 = NormalConv2d(in_channels, channels, 1, bias=False)
        self.norm_1 = LayerNorm2d(channels)
        self.conv_2 = NormalConv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm_2 = LayerNorm2d(channels)
        self.squeeze_excite = SqueezeExcite(
            channels, round(in_channels / 4), functional.silu, functional.sigmoid, conv=NormalConv2d
        )
        self.conv_3 = NormalConv2d(channels, channels, 1, bias=False)
        self.norm_3 = LayerNorm2d(channels)
        if in_channels == channels:
            self.shortcut = nn.Sequential()
        else:
            self.shortcut = nn.Sequential(NormalConv2d(in_channels, channels, 1, bias=False), LayerNorm2d(channels))

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        hidden = functional.silu(self.norm_1(self.conv_1(feature_map)))
        hidden = functional.silu(self.norm_2(self.conv_2(hidden)))
        hidden = self.norm_3(self.conv_3(self.squeeze_excite(hidden)))
        return functional.silu(hidden + self.shortcut(feature_map))
