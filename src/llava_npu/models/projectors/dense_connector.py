"""Dense Connector: several of the tower's layers, by tokens or by channels (Yao et al. 2024, arXiv:2405.13800).

The three forms of the paper, as HJYao00/DenseConnector computes them (`dense_connector.py` at 45ba932), each before the
LLaVA-1.5 MLP. Layers are indices of hidden states: 0 is the embedding's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from llava_npu.models.projectors.base import PatchOptions, Projector
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.projectors.layers import Mlp
from llava_npu.models.projectors.registry import register

_POOLED = 8  # tokens of a shallow layer that become one, in `dense_sti`


@dataclass(frozen=True)
class DenseLayersOptions(PatchOptions):
    """Options of `dense_sti` and `dense_sci`.

    Attributes:
        layers: hidden states in addition to the selected one. The default is for the 24 layers of CLIP-L.
    """

    layers: tuple[int, ...] = (7, 15)

    def check(self) -> None:
        if not self.layers:
            raise self.error("layers", "must name at least one layer")

    def feature_layers(self, selected_layer: int) -> list[int]:
        return [selected_layer, *self.layers]


class DenseTokensOptions(DenseLayersOptions):
    """Options of `dense_sti`."""

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        patches = super().num_tokens(grid, special_tokens)
        return patches + len(self.layers) * (patches // _POOLED)

    def token_grid(self, grid: Grid) -> Grid | None:
        return None


@dataclass(frozen=True)
class DenseGroupsOptions(PatchOptions):
    """Options of `dense_dci`.

    Attributes:
        groups: where each group of consecutive hidden states ends, itself not included; the first begins at 0. The
            default is for the 24 layers of CLIP-L; SigLIP-so400m has `[13, 26]`.
    """

    groups: tuple[int, ...] = (12, 24)

    def check(self) -> None:
        if not self.groups or any(end <= start for start, end in zip((0, *self.groups), self.groups, strict=False)):
            raise self.error("groups", "must be rising numbers, each the end of a group")

    def feature_layers(self, selected_layer: int) -> list[int]:
        return [selected_layer, *range(self.groups[-1])]


class _DenseProjector(Projector):
    """Cuts the concatenated layers apart, combines them, and ends in the MLP."""

    def layers_of(self, features: torch.Tensor, grid: Grid | None) -> list[torch.Tensor]:
        """The layers in `features`, each (batch, patches, vision), the selected one first."""
        self.resolve_grid(features, grid)
        return list(features.split(self.vision_hidden_size, dim=-1))


@register("dense_sti", DenseTokensOptions, aliases=("sti",))
class SparseTokenProjector(_DenseProjector):
    """Sparse token integration: tokens of shallower layers, averaged by eight, follow those of the selected layer."""

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: DenseTokensOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.mlp = Mlp(vision_hidden_size, text_hidden_size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        selected, *others = self.layers_of(features, grid)
        pooled = [functional.avg_pool1d(layer.transpose(1, 2), _POOLED).transpose(1, 2) for layer in others]
        return self.mlp(torch.cat([selected, *pooled], dim=1))


@register("dense_sci", DenseLayersOptions, aliases=("sci",))
class SparseChannelProjector(_DenseProjector):
    """Sparse channel integration: the channels of several layers side by side."""

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: DenseLayersOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.mlp = Mlp(self.input_channels, text_hidden_size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        self.resolve_grid(features, grid)
        return self.mlp(features)


@register("dense_dci", DenseGroupsOptions, aliases=("dci", "dense_connector"))
class DenseChannelProjector(_DenseProjector):
    """Dense channel integration: the selected layer, and the mean of each group of layers, side by side."""

    options: DenseGroupsOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: DenseGroupsOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.mlp = Mlp(vision_hidden_size * (1 + len(options.groups)), text_hidden_size)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        selected, *others = self.layers_of(features, grid)
        bounds = zip((0, *self.options.groups), self.options.groups, strict=False)
        means = [torch.stack(others[start:end]).mean(dim=0) for start, end in bounds]
        return self.mlp(torch.cat([selected, *means], dim=-1))
