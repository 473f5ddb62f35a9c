"""A projector for each of two towers, whose tokens take turns: Interleaved-MoF (Tong et al. 2024, arXiv:2401.06209)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llava_npu.models.projectors.base import Projector
from llava_npu.models.projectors.grid import Grid


class InterleavedProjector(Projector):
    """Twice as many tokens: the first tower's first, the second tower's first, the first tower's second, and so on.

    Args:
        projectors: of each tower, for the same number of its layers.
        tower_widths: channels of one layer of each tower.
    """

    def __init__(self, projectors: Sequence[Projector], tower_widths: Sequence[int]) -> None:
        first = projectors[0]
        width = sum(each.vision_hidden_size for each in projectors)
        super().__init__(width, first.text_hidden_size, first.options)
        self.tower_widths = tuple(tower_widths)
        self.projectors = nn.ModuleList(projectors)
        self.output_channels = first.output_channels

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """As `Projector.forward`; `features` holds the towers' channels one after the other, layer by layer."""
        self.check_channels(features)
        projectors: list[Projector] = list(self.projectors)  # type: ignore[arg-type]
        tokens = [
            projector(of_tower, grid=grid)
            for projector, of_tower in zip(projectors, self._of_each_tower(features), strict=True)
        ]
        return torch.stack(tokens, dim=2).flatten(1, 2)

    def _of_each_tower(self, features: torch.Tensor) -> Sequence[torch.Tensor]:
        """(images, tokens, layers · channels of all towers) → of each tower (images, tokens, layers · its channels).

        A "layer" is whatever comes several times: a hidden state, and with several scales each of its scales.
        """
        layers = features.unflatten(-1, (-1, sum(self.tower_widths)))
        return [each.flatten(-2) for each in layers.split(list(self.tower_widths), dim=-1)]

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        return len(self.projectors) * super().num_tokens(grid, special_tokens)

    def init_weights(self) -> None:
        for projector in self.projectors:
            projector.init_weights()  # type: ignore[operator]
