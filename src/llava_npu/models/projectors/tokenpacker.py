"""TokenPacker: coarse queries, each refined by the patches it covers.

Li et al. 2024, arXiv:2407.02392; CircleRadon/TokenPacker.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.models.projectors.attention import CrossAttention
from llava_npu.models.projectors.base import BlockOptions, Projector
from llava_npu.models.projectors.grid import Grid, to_blocks
from llava_npu.models.projectors.layers import Mlp, TruncNormalLinear
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class TokenPackerOptions(BlockOptions):
    """Options of `tokenpacker`.

    Attributes:
        scale_factor: side of the block of patches that becomes one token; divides both sides of the grid.
        output_projection: whether attention ends in its output projection. It does in TokenPacker; LLaVA-NPU of 2024
            declared one and never applied it.
        num_heads: attention heads; divides the vision tower's width.
        region_layers: hidden states of the tower that give keys and values, concatenated on channels. The default is
            for the 24 layers of CLIP-L.
    """

    output_projection: bool = True
    num_heads: int = 8
    region_layers: tuple[int, ...] = (12, 16, 22, 23)

    def check(self) -> None:
        self.require_positive("scale_factor", "num_heads")
        if not self.region_layers:
            raise self.error("region_layers", "must name at least one layer")

    def feature_layers(self, selected_layer: int) -> list[int]:
        return [selected_layer, *self.region_layers]


@register("tokenpacker", TokenPackerOptions, aliases=("token_packer",))
class TokenPackerProjector(Projector):
    """Point-to-region attention: each query, a downsampled patch, attends to the block of patches it stands for.

    Queries come from the selected layer, keys and values from several layers; the width is the vision tower's. Features
    are (batch, patches, vision·(1 + number of region layers)): the selected layer first.
    """

    options: TokenPackerOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: TokenPackerOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        if vision_hidden_size % options.num_heads:
            raise options.error("num_heads", f"must divide vision_hidden_size {vision_hidden_size}")
        width = vision_hidden_size
        region_channels = width * len(options.region_layers)
        self.q_proj = TruncNormalLinear(width, width, bias=False)
        self.k_proj = Mlp(region_channels, width, linear=TruncNormalLinear)
        self.v_proj = Mlp(region_channels, width, linear=TruncNormalLinear)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_k = nn.LayerNorm(width, eps=1e-6)
        self.ln_v = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, options.num_heads, options.output_projection)
        self.mlp = Mlp(width, text_hidden_size, linear=TruncNormalLinear)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        scale = self.options.scale_factor
        points = features[..., : self.vision_hidden_size]  # (batch, patches, vision)
        regions = features[..., self.vision_hidden_size :]  # (batch, patches, vision·region layers)
        queries = self.ln_q(self.q_proj(block_centres(to_blocks(points, grid, scale), scale)))  # (batch, tokens, width)
        keys = to_blocks(self.ln_k(self.k_proj(regions)), grid, scale)  # (batch, tokens, scale², width)
        values = to_blocks(self.ln_v(self.v_proj(regions)), grid, scale)
        batch, tokens, width = queries.shape
        packed = self.attn(queries.reshape(batch * tokens, 1, width), keys.flatten(0, 1), values.flatten(0, 1))
        return self.mlp(packed.reshape(batch, tokens, width))  # (batch, tokens, text)


def block_centres(blocks: torch.Tensor, scale: int) -> torch.Tensor:
    """Bilinear downsampling by `scale`: (batch, blocks, scale², channels) → (batch, blocks, channels).

    With aligned centres it reads the middle patch of a block, or the mean of the middle four where `scale` is even.
    Unlike `torch.nn.functional.interpolate`, whose backward pass is not deterministic on CUDA, it needs no float32.
    """
    first, last = (scale - 1) // 2, scale // 2
    square = blocks.unflatten(2, (scale, scale))
    return square[:, :, first : last + 1, first : last + 1].mean(dim=(2, 3))
