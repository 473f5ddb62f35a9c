"""S² against its definition (Shi et al. 2024, arXiv:2403.13043), written out tile by tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from llava_npu import UserError
from llava_npu.models import compose, load


def _reference(tower: Any, pixel_values: torch.Tensor, scales: list[int], layer: int, special: int) -> torch.Tensor:
    """Square images at the largest scale → (images, patches, scales × channels)."""
    base = pixel_values.shape[-1] // scales[-1]
    outputs = []
    for scale in scales:
        picture = F.interpolate(pixel_values, size=base * scale, mode="bicubic")
        rows = []
        for row in range(scale):
            line = []
            for column in range(scale):
                tile = picture[:, :, row * base : (row + 1) * base, column * base : (column + 1) * base]
                tokens = tower(tile, output_hidden_states=True).hidden_states[layer][:, special:]
                side = round(tokens.shape[1] ** 0.5)
                line.append(tokens.transpose(1, 2).unflatten(2, (side, side)))
            rows.append(torch.cat(line, dim=3))
        whole = torch.cat(rows, dim=2)
        outputs.append(F.interpolate(whole, size=whole.shape[-1] // scale, mode="area"))
    return torch.cat(outputs, dim=1).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.effect_noise((90, 60), 90).convert("RGB"), Image.effect_noise((60, 60), 50).convert("RGB")]


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "special"), [("clip", 1), ("siglip", 0)])
@pytest.mark.parametrize("scales", [[1, 2], [1, 2, 3], [1, 3]])
def test_features_equal_the_definition(
    parts: Path, tmp_path: Path, pictures: list[Image.Image], tower: str, special: int, scales: list[int]
) -> None:
    model, processor = compose(str(parts / tower), str(parts / "lm"), scales=scales)
    pixel_values = processor.preprocess_images(pictures)
    assert pixel_values.shape == (2, 3, 28 * scales[-1], 28 * scales[-1])  # details, not an enlarged small image
    features = model.eval().encode_images(pixel_values)
    expected = _reference(model.model.vision_tower, pixel_values, scales, -2, special)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert features.shape == (2, 16, 32 * len(scales))
    assert processor.num_image_tokens == 16  # no more tokens

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load(tmp_path)
    again = loaded_processor.preprocess_images(pictures)
    assert torch.equal(again, pixel_values)
    torch.testing.assert_close(loaded.encode_images(again), expected, atol=1e-5, rtol=0)


def test_several_layers_are_each_seen_at_all_scales(parts: Path, pictures: list[Image.Image]) -> None:
    """The order that a projector of several layers needs: all of one layer, then all of the next."""
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), vision_feature_layer=[-2, 1], scales=[1, 2])
    pixel_values = processor.preprocess_images(pictures)
    tower = model.eval().model.vision_tower
    expected = torch.cat([_reference(tower, pixel_values, [1, 2], layer, 1) for layer in (-2, 1)], dim=-1)
    torch.testing.assert_close(model.encode_images(pixel_values), expected, atol=1e-5, rtol=0)


def test_special_tokens_are_averaged_over_tiles(parts: Path, pictures: list[Image.Image]) -> None:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), keep_prefix_tokens=True, scales=[1, 2])
    pixel_values = processor.preprocess_images(pictures)
    features = model.eval().encode_images(pixel_values)
    tower = model.model.vision_tower
    tiles = [pixel_values[..., y : y + 28, x : x + 28] for y in (0, 28) for x in (0, 28)]
    large = torch.stack([tower(tile, output_hidden_states=True).hidden_states[-2][:, 0] for tile in tiles]).mean(0)
    torch.testing.assert_close(features[:, 0, 32:], large, atol=1e-5, rtol=0)
    torch.testing.assert_close(features[:, 1:], _reference(tower, pixel_values, [1, 2], -2, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("projector", [("ldpv2", {"num_queries": 4}), ("tokenpacker", {"region_layers": [1, 2, 3]})])
def test_projectors_take_the_wider_features(parts: Path, pictures: list[Image.Image], projector: tuple) -> None:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), *projector, scales=[1, 2])
    tokens = model.model.project(model.encode_images(processor.preprocess_images(pictures)))
    assert tokens.shape == (2, processor.num_image_tokens, 48)


@pytest.mark.parametrize("scales", [[2, 1], [2], [1, 1], [0]])
def test_scales_are_checked(parts: Path, scales: list) -> None:
    with pytest.raises(UserError, match=r"scales .* rising from 1"):
        compose(str(parts / "clip"), str(parts / "lm"), scales=scales)
