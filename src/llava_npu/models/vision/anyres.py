"""Images of any shape as several tiles: LLaVA-1.6's `anyres` with `spatial_unpad` (Liu et al. 2024, "LLaVA-NeXT").

An image is scaled into the best of several resolutions, padded with black and cut into tiles of the tower's size; the
whole image, squashed to one tile, comes first. After tower and projector the tiles' tokens are laid out as one map,
what belongs to the padding is cut away, and a learned `image_newline` ends each row. Tokens without a place in the
image (a Resampler's queries, or with special tokens among them) are no map: they follow each other tile by tile, as
with LLaVA's `mm_patch_merge_type: flat`. How many tokens there are follows from the image's size alone.

Sizes are (height, width) throughout. As everywhere in transformers, resolutions are too; LLaVA's own configurations
write (width, height), which decides ties: `resolutions_from_llava` turns them around, so that the choice is LLaVA's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from llava_npu.errors import UserError
from llava_npu.models.projectors.grid import Grid

Size = tuple[int, int]  # (height, width) in pixels

TYPICAL: Size = (480, 640)  # of an image, where one stands for all: COCO's, of which most of LLaVA's data is made
_LLAVA_16 = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # (tiles across, tiles down) that LLaVA-1.6 chooses from


@dataclass(frozen=True)
class Tiling:
    """How one model cuts images into tiles and lays out their tokens.

    Attributes:
        resolutions: sizes that an image may be scaled into, in order of preference where they fit equally.
        tile_size: of one tile, the tower's image size (with several scales, at the largest).
        token_grid: (rows, columns) of the tokens that the projector makes of one tile; of tokens without places, how
            many they are.
    """

    resolutions: tuple[Size, ...]
    tile_size: Size
    token_grid: Grid | int

    @property
    def is_map(self) -> bool:
        """Whether tokens are laid out as a map of the image, its rows ended by `image_newline`."""
        return not isinstance(self.token_grid, int)

    def layout(self, size: Size) -> Grid:
        """(rows, columns) of tiles for an image of this size, the whole image not counted."""
        height, width = select_best_resolution(size, self.resolutions)
        return height // self.tile_size[0], width // self.tile_size[1]

    def num_tiles(self, size: Size) -> int:
        """Tiles of an image of this size, the whole image included."""
        rows, columns = self.layout(size)
        return 1 + rows * columns

    def num_tokens(self, size: Size) -> int:
        """Tokens that an image of this size takes in the text."""
        if isinstance(self.token_grid, int):
            return self.num_tiles(size) * self.token_grid
        _, _, rows, columns = self._kept(size, self.token_grid)
        return self.token_grid[0] * self.token_grid[1] + rows * (columns + 1)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """The whole image squashed to one tile, then the tiles row by row."""
        rows, columns = self.layout((image.height, image.width))
        tile_height, tile_width = self.tile_size
        canvas = _fit(image, rows * tile_height, columns * tile_width)
        boxes = [
            (column * tile_width, row * tile_height, (column + 1) * tile_width, (row + 1) * tile_height)
            for row in range(rows)
            for column in range(columns)
        ]
        return [image.resize((tile_width, tile_height), Image.Resampling.BICUBIC), *map(canvas.crop, boxes)]

    def pack(self, tiles: torch.Tensor, size: Size, newline: torch.Tensor | None) -> torch.Tensor:
        """Lays out the tokens of one image's tiles.

        Args:
            tiles: (tiles, tokens of a tile, channels), the whole image first.
            size: of the image.
            newline: (channels,), what ends a row of a map; else None.

        Returns:
            (num_tokens(size), channels).
        """
        if isinstance(self.token_grid, int):
            return tiles.flatten(0, 1)
        assert newline is not None
        rows, columns = self.layout(size)
        height, width = self.token_grid
        whole, parts = tiles[0], tiles[1:]
        table = parts.reshape(rows, columns, height, width, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        top, left, kept_rows, kept_columns = self._kept(size, self.token_grid)
        table = table[top : top + kept_rows, left : left + kept_columns]  # (rows, columns, channels)
        ends = newline.to(table.dtype).expand(kept_rows, 1, -1)
        return torch.cat([whole, torch.cat([table, ends], dim=1).flatten(0, 1)])

    def _kept(self, size: Size, token_grid: Grid) -> tuple[int, int, int, int]:
        """(top, left, rows, columns) of the tokens that show the image, not padding; rounded as in transformers."""
        tile_rows, tile_columns = self.layout(size)
        rows, columns = tile_rows * token_grid[0], tile_columns * token_grid[1]
        height, width = size
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return padding, 0, rows - 2 * padding, columns
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return 0, padding, rows, columns - 2 * padding


def default_resolutions(tile_size: Size) -> list[list[int]]:
    """Those of LLaVA-1.6 for tiles of this size."""
    return [[down * tile_size[0], across * tile_size[1]] for across, down in _LLAVA_16]


def resolutions_from_llava(pinpoints: Sequence[Sequence[int]]) -> list[list[int]]:
    """LLaVA's `image_grid_pinpoints`, pairs of (width, height), as (height, width)."""
    return [list(reversed(pair)) for pair in pinpoints]


def check_resolutions(resolutions: Sequence[Sequence[int]], tile_size: Size) -> None:
    """Raises `UserError` unless each is a pair of multiples of the tile's sides."""
    for pair in resolutions:
        good = len(pair) == 2 and all(
            isinstance(side, int) and side > 0 and side % of_tile == 0
            for side, of_tile in zip(pair, tile_size, strict=True)
        )
        if not good:
            raise UserError(
                f"image_grid_pinpoints: {list(pair)} must be a pair of multiples of a tile's size, "
                f"{tile_size[0]}×{tile_size[1]} pixels; for this tower LLaVA-1.6 would have "
                f"{[[across * tile_size[1], down * tile_size[0]] for across, down in _LLAVA_16]} (width, height)."
            )
    if not resolutions:
        raise UserError("image_grid_pinpoints: the list is empty; leave it out to have LLaVA-1.6's.")


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled to fit, centred on black. The side that does not fill is rounded up, the offset down, as in LLaVA."""
    across, down = width / image.width, height / image.height
    if across < down:
        fitted = (width, min(math.ceil(image.height * across), height))
    else:
        fitted = (min(math.ceil(image.width * down), width), height)
    canvas = Image.new(image.mode, (width, height))
    offset = ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), offset)
    return canvas
