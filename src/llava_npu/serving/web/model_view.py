"""What a model gets of an image: the pixels as its tower takes them, and the places of its visual tokens.

Both are what the model computes with, made by its own processor and asked of its own projector. No attention is shown
(docs/decisions.md says why).
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw

from llava_npu.models.loaded import LoadedModel
from llava_npu.models.projectors import token_grid
from llava_npu.models.projectors.grid import Grid
from llava_npu.models.vision.image_processors import processor_size
from llava_npu.models.vision.two_towers import image_processors

_SIDE = 336  # smaller images are enlarged to about this, pixel by pixel, so that lines leave room between them
_LINE = (255, 0, 128, 170)


def model_view(loaded: LoadedModel, image: Image.Image) -> list[tuple[Image.Image, str]]:
    """The image, or with anyres its tiles, as the tower sees it, one cell for each token; and a line about it.

    Of two towers, what the first sees; where their tokens alternate, a cell is that of two.
    """
    model, processor = loaded
    config = model.config
    grid = token_grid(config.projector_type, config.tower.grid, **config.projector_options)
    preprocessing = image_processors(processor.image_processor)[0]
    tiles = [_restored(pixels, preprocessing) for pixels in processor.preprocess_images([image])]
    tokens = processor.count_image_tokens((image.height, image.width))
    line = (
        f"{tokens} tokens"
        if grid is None or config.tower_fusion == "interleave"
        else f"{tokens} tokens, {grid[0]}×{grid[1]}"
    )
    if len(tiles) > 1:  # the first is the whole image
        line = f"{tokens} tokens, {len(tiles)} tiles"
    return [(_with_cells(tile, grid), line) for tile in tiles]


def _restored(pixels: torch.Tensor, preprocessing: Any) -> Image.Image:
    """(3 or more, height, width), as an image processor prepares them for its tower, as an image again."""
    size = processor_size(preprocessing)
    if size is not None:
        pixels = pixels[:3, : size[0], : size[1]]
    if preprocessing.do_normalize:
        mean, std = torch.tensor(preprocessing.image_mean), torch.tensor(preprocessing.image_std)
        pixels = pixels * std[:, None, None] + mean[:, None, None]
    if preprocessing.do_rescale:
        pixels = pixels / preprocessing.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _with_cells(image: Image.Image, grid: Grid | None) -> Image.Image:
    factor = max(1, _SIDE // max(image.size))
    width, height = image.width * factor, image.height * factor
    image = image.resize((width, height), Image.Resampling.NEAREST)
    if grid is not None:
        draw = ImageDraw.Draw(image, "RGBA")
        for row in range(1, grid[0]):
            draw.line([(0, row * height / grid[0]), (width, row * height / grid[0])], fill=_LINE)
        for column in range(1, grid[1]):
            draw.line([(column * width / grid[1], 0), (column * width / grid[1], height)], fill=_LINE)
    return image
