"""Spatial Vision Aggregator of Cambrian-1: queries that look at the same place in every tower (Tong et al. 2024).

arXiv:2406.16860; cambrian-mllm/cambrian, `vision_sampler.py` and `cambrian_arch.py` at 539ffc3, with `connector_only`:
the layers that the authors also put into the language model are left out. So are their mask over padded patches and the
newline that ends each row of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from llava_npu.errors import UserError
from llava_npu.models.projectors.attention import split_attention
from llava_npu.models.projectors.base import Projector, SquareOptions, TowerShape
from llava_npu.models.projectors.grid import Grid, from_blocks, to_blocks, to_map, to_tokens
from llava_npu.models.projectors.layers import Mlp
from llava_npu.models.projectors.registry import register


@dataclass(frozen=True)
class SvaOptions(SquareOptions):
    """Options of `sva`; the defaults are Cambrian-1's, for one tower of 24×24 patches.

    Attributes:
        num_queries: tokens out, a square number; by default one for each place that all towers have in common.
        query_groups: sizes of the groups of queries, square numbers, each resized to `num_queries` in the end; None:
            one group of `num_queries`.
        hidden_size: width of queries, keys and values.
        num_layers: rounds of cross-attention in each group (Cambrian's `connector_depth`).
        num_heads: attention heads; divides `hidden_size`.
        tower_sides: of each tower, how many rows and columns of patches it makes; follows from the towers.
        tower_widths: of each tower, the channels of one layer; follows from the towers. None: one tower.
    """

    separate_towers: ClassVar[bool] = True

    num_queries: int = 576
    query_groups: tuple[int, ...] | None = None
    hidden_size: int = 1024
    num_layers: int = 3
    num_heads: int = 16
    tower_sides: tuple[int, ...] = (24,)
    tower_widths: tuple[int, ...] | None = None

    @classmethod
    def grid_defaults(cls, grid: Grid, towers: Sequence[TowerShape] = ()) -> dict[str, Any]:
        sides: dict[str, Any] = {"num_queries": grid[0] ** 2, "tower_sides": [grid[0]]}
        if len(towers) > 1:
            sides |= {"tower_sides": [of[0] for _, of in towers], "tower_widths": [width for width, _ in towers]}
        return sides

    def check(self) -> None:
        super().check()
        self.require_positive("hidden_size", "num_layers", "num_heads")
        if self.hidden_size % self.num_heads:
            raise self.error("num_heads", f"must divide hidden_size {self.hidden_size}")
        if self.query_groups is not None and any(
            size < 1 or math.isqrt(size) ** 2 != size for size in self.query_groups
        ):
            raise self.error("query_groups", "must be square numbers")
        for name in ("query_groups", "tower_sides", "tower_widths"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < 1):
                raise self.error(name, "must be one or more numbers of at least 1")
        if len(self.tower_widths or (1,)) != len(self.tower_sides):
            raise self.error("tower_widths", f"must be one number for each of tower_sides {list(self.tower_sides)}")

    @property
    def groups(self) -> tuple[int, ...]:
        return self.query_groups or (self.num_queries,)

    @property
    def common_side(self) -> int:
        """Rows and columns of the finest grid into which all towers' patches fit: features come on it."""
        return math.gcd(*self.tower_sides)

    def num_tokens(self, grid: Grid, special_tokens: int = 0) -> int:
        height, width = self.patches_only(grid, special_tokens)
        if height != width:
            raise UserError(
                f"Projector 'sva' takes towers with as many rows as columns; the patches are {height}×{width}."
            )
        if height != self.common_side:
            raise self.error(
                "tower_sides", f"means features on a grid of {self.common_side}×{self.common_side}, and these are on"
                f" {height}×{width}. Leave it out: it follows from the towers"
            )  # fmt: skip
        for size in self.groups:
            self._require_blocks(size)
        return self.num_queries

    def _require_blocks(self, size: int) -> None:
        """Raises UserError unless this many queries each get a block of whole patches in every tower."""
        side, common = math.isqrt(size), self.common_side
        if common % side == 0:
            return
        name = "num_queries" if self.query_groups is None else "query_groups"
        towers = " and ".join(f"{each}×{each}" for each in self.tower_sides)
        fitting = [number * number for number in range(1, common + 1) if common % number == 0]
        rounded = " or ".join(
            f"{each}×{each}" for each in sorted({max(1, common // side) * side, -(-common // side) * side})
        )
        raise UserError(
            f"Projector 'sva': each of {side}×{side} queries ({name}: {size}) looks at a block of whole patches, but"
            f" {towers} patches cannot be cut so. For these towers {name} can be {', '.join(map(str, fitting))};"
            f" for {size} queries the sides of a tower's grid must be multiples of {side}, such as {rounded}"
            " (`image_size` sets them)."
        )


@register("sva", SvaOptions, aliases=("spatial_vision_aggregator", "cambrian"))
class SvaProjector(Projector):
    """Each query attends to the patches of all towers that lie in its cell of the image, over several layers.

    Features hold the towers' channels one after the other on the grid that they have in common: a tower with finer
    patches gives those of a cell side by side (`towers.select_features`).
    """

    options: SvaOptions

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, options: SvaOptions) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, options)
        self.folds = [side // options.common_side for side in options.tower_sides]
        widths = options.tower_widths or (vision_hidden_size // self.folds[0] ** 2,)
        self.tower_channels = [fold * fold * width for fold, width in zip(self.folds, widths, strict=True)]
        layers, rest = divmod(vision_hidden_size, sum(self.tower_channels))  # of each tower: chosen layers, and scales
        if rest or not layers:
            raise options.error("tower_widths", f"cannot make the towers' {vision_hidden_size} channels")
        width = options.hidden_size
        self.towers = nn.ModuleList(
            nn.Sequential(Mlp(layers * channels, width), nn.LayerNorm(width)) for channels in widths
        )
        self.query = nn.Parameter(torch.empty(len(options.groups), width))
        self.groups = nn.ModuleList(
            nn.ModuleList(
                _SamplingLayer(width, [side // math.isqrt(size) for side in options.tower_sides], options.num_heads)
                for _ in range(options.num_layers)
            )
            for size in options.groups
        )
        self.readout = Mlp(len(options.groups) * width, text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what this module itself holds."""
        nn.init.normal_(self.query, std=self.options.hidden_size**-0.5)

    def forward(self, features: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        grid = self.resolve_grid(features, grid)
        towers = [project(each) for project, each in zip(self.towers, self._of_each_tower(features, grid), strict=True)]
        context = towers[0].mean(dim=1)  # (batch, hidden): the whole image
        side = self.options.square_side("num_queries")
        sampled = []
        for query, layers, size in zip(self.query, self.groups, self.options.groups, strict=True):
            rows = math.isqrt(size)
            blocks = [
                to_blocks(patches, (tower, tower), tower // rows)  # (batch, size, patches of a block, hidden)
                for patches, tower in zip(towers, self.options.tower_sides, strict=True)
            ]
            queries = query.expand(len(features), size, -1)
            for layer in layers:  # type: ignore[attr-defined]
                queries = layer(queries, context, blocks)
            sampled.append(_resized(queries, rows, side))
        return self.readout(torch.cat(sampled, dim=-1))  # (batch, num_queries, text)

    def _of_each_tower(self, features: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
        """(batch, cells, layers · all channels) → of each tower (batch, its patches, layers · its channels)."""
        layers = features.unflatten(-1, (-1, sum(self.tower_channels)))
        patches = []
        for fold, of_tower in zip(self.folds, layers.split(self.tower_channels, dim=-1), strict=True):
            cells = (
                of_tower.unflatten(-1, (fold * fold, -1)).transpose(2, 3).flatten(3)
            )  # (batch, cells, fold², channels)
            patches.append(from_blocks(cells, grid, fold))
        return patches


class _SamplingLayer(nn.Module):
    """One round: queries, told of the whole image, attend to their blocks.

    Args:
        width: of queries, keys and values.
        sides: of each tower, rows and columns of a query's block; of more than one patch, positions are learned.
        num_heads: divides the width.
    """

    def __init__(self, width: int, sides: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_context = nn.Linear(width, width, bias=False)
        self.proj_in = nn.Linear(2 * width, width, bias=False)
        for tower, side in enumerate(sides):  # not a ParameterDict: ZeRO-3 gathers a module's own parameters
            table = nn.Parameter(torch.empty(side * side, width)) if side > 1 else None
            self.register_parameter(f"positions_{tower}", table)
        self.q_proj = _normed_linear(width)
        self.k_proj = nn.ModuleList(_normed_linear(width) for _ in sides)
        self.v_proj = nn.ModuleList(_normed_linear(width) for _ in sides)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.proj_out = Mlp(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what this module itself holds."""
        for table in self.parameters(recurse=False):
            nn.init.normal_(table)

    def forward(self, queries: torch.Tensor, context: torch.Tensor, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        Args:
            queries: (batch, queries, width).
            context: (batch, width).
            blocks: of each tower (batch, queries, patches, width).

        Returns:
            the queries' new values.
        """
        told = self.proj_context(context).unsqueeze(1).expand_as(queries)
        inner = self.proj_in(torch.cat([queries, told], dim=-1))
        keys, values = [], []
        for tower, patches in enumerate(blocks):
            positions = getattr(self, f"positions_{tower}")
            if positions is not None:
                patches = patches + positions.to(patches.dtype)
            keys.append(self.k_proj[tower](patches))
            values.append(self.v_proj[tower](patches))
        attended = split_attention(  # each query by itself
            self.q_proj(inner).flatten(0, 1).unsqueeze(1),
            torch.cat(keys, dim=2).flatten(0, 1),
            torch.cat(values, dim=2).flatten(0, 1),
            self.num_heads,
        ).view_as(inner)
        return queries + self.proj_out(self.norm(inner + self.o_proj(attended)))


def _normed_linear(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))


def _resized(queries: torch.Tensor, rows: int, side: int) -> torch.Tensor:
    """(batch, rows², width) → (batch, side², width), bilinear in at least float32."""
    if rows == side:
        return queries
    square = to_map(queries, (rows, rows))
    square = square.to(torch.promote_types(square.dtype, torch.float32))
    return to_tokens(functional.interpolate(square, (side, side), mode="bilinear")).to(queries.dtype)
