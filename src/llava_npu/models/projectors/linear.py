"""One linear layer (LLaVA 1, Liu et al. 2023, arXiv:2304.08485)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.models.projectors.base import Projector, TokenwiseOptions
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class LinearOptions(TokenwiseOptions):
    """Options of `linear`.

    Attributes:
        bias: whether the layer has a bias.
    """

    bias: bool = True


@register("linear", LinearOptions)
class LinearProjector(Projector):
    """y = x·Wᵀ + b for every token; class tokens welcome."""

    options: LinearOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: LinearOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.linear_1 = nn.Linear(vision_hidden_size, text_hidden_size, bias=options.bias)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        self.check_channels(features)
        return self.linear_1(features)
