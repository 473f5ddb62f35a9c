"""No projector: for a tower that already speaks the language model's width, and as a baseline in code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava_npu.models.projectors.base import Projector, TokenwiseOptions
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class IdentityOptions(TokenwiseOptions):
    """`identity` has no options."""


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
