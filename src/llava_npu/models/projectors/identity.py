"""No projector: for a tower that already speaks the language model's width, and as a baseline in code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_npu.models.projectors.base import Projector, ProjectorOptions
from llava_npu.models.projectors.grid import Grid, as_grid
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class IdentityOptions(ProjectorOptions):
    """`identity` has no options."""

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        height, width = as_grid(grid)
        return height * width + special_tokens

    def token_grid(self, grid: Grid) -> Grid | None:
        return as_grid(grid)


@register("identity", IdentityOptions)
class IdentityProjector(Projector):
    """Returns the features as they are: `output_channels` is the vision width, as in LLaVA."""

    options: IdentityOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: IdentityOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.output_channels = vision_hidden_size

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        self.check_channels(features)
        return features
