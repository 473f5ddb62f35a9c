"""Which towers fit, and that nobody guesses where their patches are: each is asked, by running it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    ViTImageProcessorPil,
)

from llava_npu import LlavaNpuConfig, UserError
from llava_npu.models import compose, load
from llava_npu.models.vision.tower_probe import probe_tower
from llava_npu.models.vision.towers import describe_tower
from support import tiny

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZE = {"image_size": 28, "patch_size": 7}


def _config(kind: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[kind](**{**SMALL, **SIZE, **changes})


# kind, what its configuration says beside sizes, special tokens in front of the patches
KNOWN = [
    ("clip_vision_model", {}, 1),
    ("siglip_vision_model", {}, 0),
    ("dinov2", {}, 1),
    ("dinov2_with_registers", {"num_register_tokens": 4}, 5),
    ("dinov2_with_registers", {"num_register_tokens": 2}, 3),
]
ASKED = [
    ("vit", {}, 1),
    ("deit", {}, 2),
    ("beit", {}, 1),
    ("ijepa", {}, 0),
    ("dinov3_vit", {"num_register_tokens": 4}, 5),
    ("dinov3_vit", {"num_register_tokens": 0}, 1),
    ("aimv2_vision_model", {}, 0),
    ("mlcd_vision_model", {}, 1),
    ("pixtral", {}, 0),
]


@pytest.mark.parametrize(("kind", "options", "special_tokens"), KNOWN + ASKED)
def test_special_tokens_are_where_the_tower_has_them(kind: str, options: dict, special_tokens: int) -> None:
    config = _config(kind, **options)
    described = describe_tower(config)
    assert described.num_prefix_tokens == special_tokens
    assert (described.grid, described.num_layers, described.hidden_size) == ((4, 4), 3, 32)
    seen = probe_tower(config, (28, 28))
    assert seen.num_prefix_tokens == special_tokens  # also of the kinds that are known by name
    assert (seen.grid, seen.num_layers, seen.hidden_size) == ((4, 4), 3, 32)


@pytest.mark.parametrize("shape", [(28, 56), (56, 28)])
def test_a_tower_that_is_not_square(shape: tuple[int, int]) -> None:
    config = _config("ijepa", image_size=list(shape))
    assert describe_tower(config).grid == (shape[0] // 7, shape[1] // 7)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("siglip2_vision_model", {}, r"siglip2_vision_model.*fixed size.*siglip2-so400m-patch14-384"),
        ("yolos", {"image_size": [28, 28], "num_detection_tokens": 5}, "22 tokens, which are not special tokens"),
        ("vit_mae", {}, "which are not special tokens followed by the patches"),
        ("bert", {}, "cannot be used"),
    ],
)
def test_what_gives_no_map_of_patches_is_refused(kind: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_tower(_config(kind, **options))


def test_a_pyramid_of_windows_is_refused() -> None:
    config = CONFIG_MAPPING["swin"](embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=56)
    with pytest.raises(UserError, match="differing shapes"):
        describe_tower(config)


def test_a_convolutional_network_with_a_size_of_its_own() -> None:
    config = CONFIG_MAPPING["convnext"](hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
    tower = describe_tower(config)
    assert (tower.grid, tower.hidden_size, tower.last_layer_only) == ((2, 2), 32, True)


def test_asking_draws_no_random_number() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    probe_tower(_config("vit", hidden_size=16), (28, 28))
    assert torch.equal(torch.rand(1), expected)


def test_siglip_so400m_keeps_all_729_patches() -> None:
    vision = SiglipVisionConfig(image_size=384, patch_size=14, hidden_size=1152, num_hidden_layers=27)
    config = LlavaNpuConfig(vision_config=vision, text_config=tiny.text_config())
    assert config.vision_feature_select_strategy == "full"
    assert config.num_image_tokens == 729


def _write(folder: Path, tower: Any, image_processor: Any) -> str:
    tower.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return str(folder)


def _random(config: Any) -> Any:
    """Random weights everywhere: tables of positions start at zero in some towers."""
    torch.manual_seed(0)
    tower = AutoModel.from_config(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tower


@pytest.mark.parametrize(("kind", "options", "special_tokens"), [KNOWN[3], *ASKED[:1], ASKED[4]])
@pytest.mark.parametrize("layers", [-2, [-1, 2]])
def test_patches_of_any_tower_reach_the_projector(
    parts: Path, tmp_path: Path, kind: str, options: dict, special_tokens: int, layers: Any
) -> None:
    tower = _random(_config(kind, **options))
    source = _write(tmp_path / "tower", tower, ViTImageProcessorPil(size={"height": 28, "width": 28}))
    model, processor = compose(source, str(parts / "lm"), vision_feature_layer=layers)
    pixel_values = processor.preprocess_images([Image.effect_noise((40, 20), 90).convert("RGB")])
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    expected = torch.cat([states[i][:, special_tokens:] for i in ([layers] if isinstance(layers, int) else layers)], -1)
    torch.testing.assert_close(model.eval().encode_images(pixel_values), expected, atol=1e-5, rtol=0)
    assert processor.num_image_tokens == 16

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, _ = load(tmp_path / "saved")
    torch.testing.assert_close(loaded.encode_images(pixel_values), expected, atol=1e-5, rtol=0)


def test_all_special_tokens_with_cls_patch(parts: Path, tmp_path: Path) -> None:
    tower = _random(_config("dinov2_with_registers", num_register_tokens=4))
    source = _write(tmp_path, tower, ViTImageProcessorPil(size={"height": 28, "width": 28}))
    model, processor = compose(source, str(parts / "lm"), keep_prefix_tokens=True)
    assert processor.num_image_tokens == 21
    assert model.encode_images(torch.zeros(1, 3, 28, 28)).shape == (1, 21, 32)


def test_a_whole_siglip_2_of_fixed_resolution(parts: Path, tmp_path: Path) -> None:
    """Those are published as `siglip` models; their vision half has a pooling head that nothing reads."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = SiglipModel(SiglipConfig(vision_config={**SMALL, **SIZE}, text_config=text)).eval()
    source = _write(tmp_path, whole, SiglipImageProcessorPil(size={"height": 28, "width": 28}))
    model, processor = compose(source, str(parts / "lm"))
    pixel_values = torch.randn(1, 3, 28, 28)
    expected = whole.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.eval().encode_images(pixel_values), expected, atol=1e-6, rtol=0)
    assert processor.num_image_tokens == 16


def test_a_tower_published_without_its_pooler_loads_alike_every_time(parts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    without = AutoModel.from_config(_config("vit"), add_pooling_layer=False)
    source = _write(tmp_path, without, ViTImageProcessorPil(size={"height": 28, "width": 28}))
    first, second = (compose(source, str(parts / "lm"), seed=seed)[0].model.vision_tower for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---- other sizes ----


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("size", [14, 35, 56])
def test_any_image_size_equals_transformers_interpolation(parts: Path, tmp_path: Path, tower: str, size: int) -> None:
    model, processor = compose(str(parts / tower), str(parts / "lm"), image_size=size)
    pixel_values = processor.preprocess_images([Image.effect_noise((90, 60), 90).convert("RGB")])
    assert pixel_values.shape == (1, 3, size, size)
    reference = AutoModel.from_pretrained(parts / tower).eval()
    states = reference(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    expected = states[-2][:, 1:] if tower == "clip" else states[-2]
    torch.testing.assert_close(model.eval().encode_images(pixel_values), expected, atol=1e-5, rtol=0)
    assert processor.num_image_tokens == (size // 7) ** 2

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load(tmp_path)
    assert loaded_processor.num_image_tokens == (size // 7) ** 2
    torch.testing.assert_close(loaded.encode_images(pixel_values), expected, atol=1e-5, rtol=0)


def test_dinov2_takes_the_size_of_its_image_processor(parts: Path, tmp_path: Path) -> None:
    """As published: positions for 518 pixels, images of 224."""
    tower = _random(_config("dinov2_with_registers", image_size=56, num_register_tokens=4))
    preprocessing = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    model, processor = compose(_write(tmp_path, tower, preprocessing), str(parts / "lm"))
    assert processor.num_image_tokens == 16
    pixel_values = torch.randn(1, 3, 28, 28)
    expected = tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 5:]
    torch.testing.assert_close(model.eval().encode_images(pixel_values), expected, atol=1e-5, rtol=0)


def test_sizes_that_contradict_each_other_are_an_error(parts: Path, tmp_path: Path) -> None:
    tower = AutoModel.from_pretrained(parts / "clip")
    other = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    with pytest.raises(UserError, match=r"images of 56×56 pixels, but it takes 28×28.*model\.image_size"):
        compose(_write(tmp_path, tower, other), str(parts / "lm"))


def test_positions_that_are_no_table_cannot_be_resized(parts: Path, tmp_path: Path) -> None:
    tower = AutoModel.from_config(_config("beit", use_relative_position_bias=True))
    source = _write(tmp_path, tower, ViTImageProcessorPil(size={"height": 28, "width": 28}))
    with pytest.raises(UserError, match=r"image_size: .*relative_position_bias_table.*leave the size"):
        compose(source, str(parts / "lm"), image_size=56)


def test_description_does_not_change_the_configuration() -> None:
    config = _config("vit")
    before = copy.deepcopy(config.to_dict())
    describe_tower(config)
    assert config.to_dict() == before
