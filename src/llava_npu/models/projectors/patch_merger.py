"""Patch merger of Qwen2-VL (Wang et al. 2024, arXiv:2409.12191): norm each patch, fold blocks of patches, MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from llava_npu.models.projectors.base import BlockOptions, Projector
from llava_npu.models.projectors.grid import Grid, to_blocks
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class PatchMergerOptions(BlockOptions):
    """Options of `patch_merger`.

    Attributes:
        scale_factor: side of the block of patches that becomes one token; divides both sides of the grid. Qwen2-VL's
            `spatial_merge_size`.
    """


@register("patch_merger", PatchMergerOptions, aliases=("qwen2_vl", "patchmerger"))
class PatchMergerProjector(Projector):
    """Layer norm over each patch, s² patches side by side, then Linear, GELU, Linear at the width s²·V.

    `pixel_shuffle` normalises after folding and has its first layer at the language model's width.
    """

    options: PatchMergerOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: PatchMergerOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        folded = vision_hidden_size * options.scale_factor**2
        self.norm = nn.LayerNorm(vision_hidden_size, eps=1e-6)
        self.linear_1 = nn.Linear(folded, folded)
        self.linear_2 = nn.Linear(folded, text_hidden_size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        blocks = to_blocks(self.norm(features), grid, self.options.scale_factor)  # (batch, tokens, s², vision)
        return self.linear_2(functional.gelu(self.linear_1(blocks.flatten(2))))
