"""Two towers in one model, against each tower run by hand through transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from llava_npu import UserError, load
from llava_npu.config import RunConfig, validate
from llava_npu.data.images import pad_to_square
from llava_npu.evaluation.answering import build_answerer
from llava_npu.evaluation.run import evaluate
from llava_npu.models import compose
from llava_npu.models.checkpoints.convert import convert
from llava_npu.models.flops import flop_model
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.sources import ModelSource, read_source, write_source
from llava_npu.models.vision.feature_cache import open_feature_cache
from llava_npu.serving.web.model_view import model_view
from llava_npu.training import train
from llava_npu.training.architecture import model_config
from support import tiny
from support.comparison_samples import QUESTIONS, write_benchmark
from support.small_run import small_run

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _write_dino(folder: Path, patch: int) -> None:
    """A DINOv2 for 4×4 patches, of another width and depth than the tiny SigLIP, published for larger images."""
    torch.manual_seed(2)
    config = Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=6 * patch,
        patch_size=patch,
        num_register_tokens=2,
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    side = {"height": 4 * patch, "width": 4 * patch}
    BitImageProcessorPil(
        size={"shortest_edge": 4 * patch}, crop_size=side, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `lm`, `siglip`, `dino` (both of 28 pixels), `large` (DINOv2 of 56 pixels) and data."""
    folder = tmp_path_factory.mktemp("towers")
    tiny.write_language_model(folder / "lm")
    tiny.write_siglip(folder / "siglip")
    _write_dino(folder / "dino", 7)
    _write_dino(folder / "large", 14)
    tiny.write_captions(folder)
    tiny.write_records(folder)
    write_benchmark(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.effect_noise((90, 60), 90).convert("RGB"), Image.effect_noise((40, 60), 50).convert("RGB")]


def _compose(towers: Path, *names: str, **options: Any) -> LoadedModel:
    loaded = compose([str(towers / name) for name in names], str(towers / "lm"), **options)
    loaded.model.eval()
    return loaded


def _by_hand(towers: Path, name: str, images: Sequence[Image.Image], layers: Sequence[int]) -> torch.Tensor:
    """One tower's features (images, patches, layers · channels): its own padding, pixels and special tokens."""
    processor = AutoImageProcessor.from_pretrained(towers / name, backend="pil")
    colour = tuple(int(255 * value) for value in processor.image_mean)
    padded = [pad_to_square(image, colour) for image in images]
    pixels = processor(images=padded, return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(towers / name).eval()
    model = getattr(model, "vision_model", model)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    special = 3 if name in ("dino", "large") else 0
    return torch.cat([states[layer][:, special:] for layer in layers], dim=-1)


@pytest.mark.parametrize("dino", ["dino", "large"])
def test_features_are_those_of_both_side_by_side(towers: Path, images: list[Image.Image], dino: str) -> None:
    """Also where one tower takes larger images than the other, and in either order."""
    names, side = (("dino", "siglip"), 28) if dino == "dino" else (("siglip", "large"), 56)
    loaded = _compose(towers, *names)
    pixels = loaded.processor.preprocess_images(images)
    assert pixels.shape == (2, 6, side, side)
    with torch.no_grad():
        features = loaded.model.encode_images(pixels)
    expected = torch.cat([_by_hand(towers, name, images, [-2]) for name in names], dim=-1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert loaded.processor.num_image_tokens == 16
    (shown, line), *_ = model_view(loaded, images[0])
    assert line == "16 tokens, 4×4"
    assert shown.width == shown.height


@pytest.mark.parametrize("layers", [[-2], [-2, 1]])
def test_interleaved_tokens_take_turns(towers: Path, images: list[Image.Image], layers: list[int]) -> None:
    loaded = _compose(
        towers,
        "dino",
        "siglip",
        tower_fusion="interleave",
        vision_feature_layer=layers if len(layers) > 1 else layers[0],
    )
    model, processor = loaded
    with torch.no_grad():
        tokens = model.model.project(model.encode_images(processor.preprocess_images(images)))
        assert tokens.shape == (2, 32, 48)
        assert processor.num_image_tokens == model.config.num_image_tokens == 32
        for first, name in enumerate(("dino", "siglip")):
            projector = model.model.multi_modal_projector.projectors[first]
            expected = projector(_by_hand(towers, name, images, layers), grid=(4, 4))
            torch.testing.assert_close(tokens[:, first::2], expected, atol=1e-5, rtol=0)


def test_scales_and_tiles_are_seen_by_both(towers: Path, images: list[Image.Image]) -> None:
    """What two towers give with S² and anyres is what each gives alone, side by side."""
    options = {"scales": [1, 2], "image_aspect_ratio": "anyres"}
    both = _compose(towers, "dino", "siglip", **options)
    pixels = both.processor.preprocess_images(images)
    with torch.no_grad():
        features = both.model.encode_images(pixels)
        alone = []
        for number, name in enumerate(("dino", "siglip")):
            one = compose(str(towers / name), str(towers / "lm"), **options)
            assert torch.equal(one.processor.preprocess_images(images), pixels[:, 3 * number : 3 * number + 3])
            alone.append(one.model.eval().encode_images(pixels[:, 3 * number : 3 * number + 3]).unflatten(-1, (2, -1)))
    torch.testing.assert_close(features, torch.cat(alone, dim=-1).flatten(-2), atol=1e-5, rtol=0)
    sizes = [(image.height, image.width) for image in images]
    assert [both.processor.count_image_tokens(size) for size in sizes] == [
        one.processor.count_image_tokens(size) for size in sizes
    ]


def test_towers_whose_patches_do_not_meet_are_told_which_do(towers: Path) -> None:
    with pytest.raises(UserError) as caught:
        _compose(towers, "large", "siglip", image_size=28)
    message = str(caught.value)
    assert "dinov2_with_registers makes 2×2 of 28×28 pixels, siglip_vision_model makes 4×4 of 28×28 pixels" in message
    assert "`image_size: [28, 14]` (2×2 patches) or `image_size: [56, 28]` (4×4 patches)" in message
    for sizes, patches in (([28, 14], 4), ([56, 28], 16)):
        assert _compose(towers, "large", "siglip", image_size=sizes).processor.num_image_tokens == patches


def test_each_towers_own_grid_for_sva(towers: Path, images: list[Image.Image]) -> None:
    """Patches of the finer tower lie in the order of the coarser one's; the projector puts them back."""
    options = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    loaded = _compose(
        towers, "large", "siglip", projector_type="sva", projector_options=options, image_size=28, scales=[1]
    )
    config = loaded.model.config
    assert config.projector_options == {**options, "num_queries": 4, "tower_sides": [2, 4], "tower_widths": [16, 32]}
    assert (loaded.processor.num_image_tokens, config.tower.grid, config.tower.hidden_size) == (4, (2, 2), 16 + 4 * 32)
    with torch.no_grad():
        features = loaded.model.encode_images(loaded.processor.preprocess_images(images))
    projector = loaded.model.model.multi_modal_projector
    assert projector.input_channels == features.shape[-1]
    first, second = projector._of_each_tower(features, (2, 2))
    expected = loaded.model.model.vision_tower(loaded.processor.preprocess_images(images)).hidden_states
    torch.testing.assert_close(first, expected[0][-2][:, 3:])
    torch.testing.assert_close(second, expected[1][-2])
    (_, line), *_ = model_view(loaded, images[0])
    assert line == "4 tokens, 2×2"


def test_what_sva_cannot_have(towers: Path) -> None:
    for options, reason in (
        ({"tower_fusion": "interleave"}, "'sva' joins two towers itself"),
        ({"projector_options": {"num_queries": 16}, "image_size": 28}, "num_queries can be 1, 4;"),
        ({"scales": [1, 2], "image_size": 28}, "do not meet"),
    ):
        with pytest.raises(UserError, match=reason):
            _compose(towers, "large", "siglip", projector_type="sva", **options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_tower": ["a", "b", "c"]}, "takes one tower or two, and has 3"),
        ({"vision_tower": []}, "give `checkpoint`, or both"),
        ({"vision_tower": "a", "tower_fusion": "interleave"}, "takes a list of two towers"),
        ({"vision_select_feature": "cls_patch"}, "only patches have places in common"),
        ({"image_size": [28, 28, 28]}, "3 sizes for 2 vision"),
        ({"vision_tower": "a", "image_size": [28, 28]}, "2 sizes for 1 vision"),
        ({"vision_tower": 3}, "`model.vision_tower` is 3"),
        ({"image_size": [28, 0]}, "`model.image_size.1` is 0"),
        ({"tower_fusion": "add"}, "model.tower_fusion"),
    ],
)
def test_settings_that_two_towers_cannot_have(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    values = small_run(tmp_path, tmp_path, "cpu").model_dump()
    values["model"] |= {"vision_tower": ["a", "b"], **changes}
    with pytest.raises(UserError, match=reason):
        validate(RunConfig, values, "run.yaml")


@pytest.mark.slow
def test_a_plan_knows_the_model_that_is_made(towers: Path) -> None:
    names = [str(towers / "large"), str(towers / "siglip")]
    run = small_run(towers, towers / "out", "cpu", model={"vision_tower": names, "tower_fusion": "interleave"})
    planned, _ = model_config(run)
    loaded = _compose(towers, "large", "siglip", tower_fusion="interleave")
    made = loaded.model.config
    assert planned.tower == made.tower
    assert (planned.num_image_tokens, planned.projector_input_size) == (32, 48)
    work = flop_model(loaded.model)
    alone = [flop_model(compose(name, str(towers / "lm")).model) for name in names]
    assert work.tower == alone[0].tower + alone[1].tower
    assert work.projector == alone[0].projector + alone[1].projector


def _run(towers: Path, output: Path, device: torch.device, **changes: Any) -> RunConfig:
    return small_run(towers, output, device.type, **{"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, **changes})


@pytest.mark.slow
def test_it_is_trained_saved_and_asked(
    towers: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen towers with cached features, then towers that learn."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = {
        "vision_tower": [str(towers / "dino"), str(towers / "siglip")],
        "language_model": str(towers / "lm"),
        "tower_fusion": "interleave",
    }
    data = {"cache_features": True}
    train(_run(towers, tmp_path / "align", device, stage="align", model=model, data=data))
    run = _run(
        towers,
        tmp_path / "finetune",
        device,
        model={"checkpoint": str(tmp_path / "align"), "vision_tower": None, "language_model": None},
        parts={"vision_tower": {"train": "full"}},
        max_steps=1,
        gradient_checkpointing=True,
        optimizer={"learning_rate": 1e-2, "warmup_ratio": 0.0},
    )
    train(run)
    before, after = (load(tmp_path / name, device).model.state_dict() for name in ("align", "finetune"))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    for tower in ("first.encoder.layer.0.", "second.encoder.layers.0."):
        assert any(name.startswith(f"model.vision_tower.{tower}") for name in changed)
    assert open_feature_cache(load(tmp_path / "align")).folder.is_dir()
    loaded = load(tmp_path / "finetune", device)
    image = Image.open(towers / "images/0.png")
    batch = loaded.processor.encode_prompts([[{"from": "human", "value": "<image>\nWhat is it?"}]], [[image]])
    assert (batch["input_ids"] == loaded.processor.image_token_id).sum() == 32
    for answer in ("generate", "likelihood"):
        answerer = build_answerer(answer, loaded, max_new_tokens=3)
        report = evaluate("multiple_choice", towers / "questions.tsv", answerer, tmp_path / answer)
        assert {score.count for score in report.scores} == {QUESTIONS}


def test_both_ways_to_join_towers_share_cached_features(towers: Path) -> None:
    joined = [_compose(towers, "dino", "siglip", tower_fusion=fusion) for fusion in ("channel", "interleave")]
    first, second = (open_feature_cache(loaded).folder for loaded in joined)
    assert first == second


def test_where_adapters_find_both_towers_again(towers: Path, tmp_path: Path) -> None:
    names = [str(towers / "dino"), str(towers / "siglip")]
    source = ModelSource(parts={"vision_tower": names, "language_model": str(towers / "lm")})
    write_source(tmp_path / "base.json", source)
    found = read_source(tmp_path / "base.json")
    assert found.parts == source.parts
    assert list(found.locations) == ["vision_tower[0]", "vision_tower[1]", "language_model"]


def test_it_is_written_for_transformers_and_for_nobody_else(towers: Path, tmp_path: Path) -> None:
    loaded = _compose(towers, "dino", "siglip")
    loaded.save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert values["model_type"] == "llava_npu"
    convert(str(tmp_path / "model"), tmp_path / "hf", "hf")
    again = load(tmp_path / "hf").model.state_dict()
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(again[name], weight), name
    with pytest.raises(UserError, match="official LLaVA has one"):
        convert(str(tmp_path / "model"), tmp_path / "official", "official")
