"""The LLaVA-1.5 projector: linear layers with GELU between (Liu et al. 2023, arXiv:2310.03744).

With two layers the parameters are named as in transformers' `LlavaMultiModalProjector`, so that the saved model is a
plain LLaVA checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from llava_npu.models.projectors.base import Projector, TokenwiseOptions
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class MlpOptions(TokenwiseOptions):
    """Options of `mlp{N}x_gelu`.

    Attributes:
        depth: number of linear layers, the N of the name.
        bias: whether the layers have biases (`multimodal_projector_bias` in transformers).
    """

    depth: int = 2
    bias: bool = True

    def check(self) -> None:
        self.require_positive("depth")


@register("mlp{N}x_gelu", MlpOptions, aliases=("mlp", "mlp_gelu", "gelu_mlp"), pattern=r"mlp(?P<depth>\d+)x_gelu")
class MlpProjector(Projector):
    """Linear(vision, text), then N−1 times GELU and Linear(text, text), for every token; class tokens welcome."""

    options: MlpOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: MlpOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.linear_1 = nn.Linear(vision_hidden_size, text_hidden_size, bias=options.bias)
        for number in range(2, options.depth + 1):
            self.add_module(f"linear_{number}", nn.Linear(text_hidden_size, text_hidden_size, bias=options.bias))

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        self.check_channels(features)
        hidden = self.linear_1(features)
        for number in range(2, self.options.depth + 1):
            hidden = self.get_submodule(f"linear_{number}")(functional.gelu(hidden))
        return hidden
