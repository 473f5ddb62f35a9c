"""`pad` and `square` against official LLaVA's steps (llava/mm_utils.py, CLIPImageProcessor), done with Pillow here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_npu.data import images
from llava_npu.models import compose

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = [(64, 48), (33, 90), (28, 28), (29, 28), (7, 7), (300, 20), (51, 50)]  # (width, height)


def _picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    shades = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    noise = np.random.default_rng(width).integers(-40, 40, shades.shape)
    return Image.fromarray((shades + noise).clip(0, 255).astype(np.uint8))


def _expand_to_square(picture: Image.Image, color: tuple[int, ...]) -> Image.Image:
    width, height = picture.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, (int((side - width) / 2), int((side - height) / 2)))
    return square


def _clip(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    picture = picture.resize((size, other) if width <= height else (other, size), Image.Resampling.BICUBIC)
    width, height = picture.size
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _normalise(picture: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    values = (np.asarray(picture).astype(np.float64) / 255 - mean) / std
    return torch.from_numpy(values.transpose(2, 0, 1)).float()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["pad", "square"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "as a long thin image"])
def test_pixels_are_the_official_ones(
    parts: Path, tower: str, way: str, size: tuple[int, int], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(images, "_PADDED_PIXELS", 0)
    _, processor = compose(str(parts / tower), str(parts / "lm"), image_aspect_ratio=way)
    mean, std = CLIP if tower == "clip" else SIGLIP
    picture = _picture(size)
    prepared = _expand_to_square(picture, tuple(int(255 * each) for each in mean)) if way == "pad" else picture
    prepared = _clip(prepared, 28) if tower == "clip" else prepared.resize((28, 28), Image.Resampling.BICUBIC)
    actual = processor.preprocess_images([picture])[0]
    levels = (actual - _normalise(prepared, mean, std)) * torch.tensor(std)[:, None, None] * 255
    assert levels.abs().max() < 1.01
    assert levels.abs().mean() < 0.01  # not one pixel in a hundred differs at all


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (40_000, 600), (1, 1_000_000)])
@pytest.mark.parametrize("way", ["pad", "square"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_long_thin_image_takes_no_more_memory_than_itself(
    parts: Path, tower: str, way: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = compose(str(parts / tower), str(parts / "lm"), image_aspect_ratio=way)
    new, resize, made = Image.new, Image.Image.resize, []
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: made.append(size) or new(mode, size, *rest))
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda image, size, *rest, **more: made.append(size) or resize(image, size, *rest, **more),
    )
    picture = new("RGB", size, "white")
    assert processor.preprocess_images([picture]).shape == (1, 3, 28, 28)
    assert made
    assert max(width * height for width, height in made) <= max(28 * 65_536, size[0] * size[1])
