"""anyres: LLaVA's choices of tiles, and pixels, token counts, logits and files of transformers' LLaVA-NeXT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    pipeline,
)

from llava_npu import LlavaNpuConfig, LlavaNpuForConditionalGeneration, LlavaNpuProcessor, UserError
from llava_npu.models import compose, load
from llava_npu.models.composing import change_aspect_ratio
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.vision.anyres import Tiling, default_resolutions, resolutions_from_llava
from support import tiny

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/misc.json").read_text())["anyres"]
LLAVA_16 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (width, height)
SIZES = [(50, 100), (100, 50), (28, 28), (640, 480), (300, 1000), (97, 31), (31, 98), (1, 1), (4000, 100), (29, 28)]


def _picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "×".join(map(str, case["size"])))
def test_the_choice_is_llavas(case: dict) -> None:
    tiling = Tiling(tuple(map(tuple, resolutions_from_llava(LLAVA_16))), (336, 336), (24, 24))
    width, height = case["size"]
    assert list(reversed(tiling.layout((height, width)))) == case["grid"]


def test_default_resolutions_are_llavas() -> None:
    assert default_resolutions((336, 336)) == resolutions_from_llava(LLAVA_16)


@pytest.fixture(scope="module")
def composed(parts: Path) -> LoadedModel:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), image_aspect_ratio="anyres")
    return LoadedModel(model.eval(), processor)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_transformers(composed: LoadedModel, size: tuple[int, int]) -> None:
    model, processor = composed
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )
    picture = _picture(*size)
    expected = reference(images=[picture], return_tensors="pt")["pixel_values"][0]
    actual = processor.preprocess_images([picture])
    assert actual.shape == expected.shape
    one_level = 1 / 255 / min(reference.image_std)
    torch.testing.assert_close(actual, expected, atol=one_level, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_token_counts_equal_transformers(composed: LoadedModel, size: tuple[int, int]) -> None:
    model, processor = composed
    reference = LlavaNextProcessor(
        LlavaNextImageProcessorPil(image_grid_pinpoints=model.config.image_grid_pinpoints),
        processor.tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    width, height = size
    expected = reference._get_number_of_features(height, width, 28, 28) - 1
    assert processor.count_image_tokens((height, width)) == expected


# ---- the model beside transformers' ----


def _pair(tower: str) -> tuple[LlavaNextForConditionalGeneration, LlavaNpuForConditionalGeneration]:
    vision, strategy = (tiny.clip_config, "default") if tower == "clip" else (tiny.siglip_config, "full")
    common = {"image_token_index": 300, "image_grid_pinpoints": default_resolutions((28, 28))}
    torch.manual_seed(0)
    reference = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision(), text_config=tiny.text_config(), vision_feature_select_strategy=strategy, **common
        )
    ).eval()
    ours = LlavaNpuForConditionalGeneration(
        LlavaNpuConfig(vision_config=vision(), text_config=tiny.text_config(), **common)
    ).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def _batch(config: LlavaNpuConfig) -> tuple[dict[str, Any], torch.Tensor]:
    """Two texts with three images of different shapes, and the tiles as transformers pads them."""
    sizes = [(60, 25), (30, 30), (20, 90)]  # (height, width)
    tiling = config.tiling
    assert tiling is not None
    torch.manual_seed(1)
    counts = [tiling.num_tiles(size) for size in sizes]
    tiles = [torch.randn(count, 3, 28, 28) for count in counts]
    image = [[300] * tiling.num_tokens(size) for size in sizes]
    rows = [[5, 6, *image[0], 7, 8, 9], [*image[1], 10, 11, *image[2], 12]]
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.where((input_ids == 300) | (mask == 0), -100, input_ids)
    padded = torch.zeros(3, max(counts), 3, 28, 28)
    for place, each in zip(padded, tiles, strict=True):
        place[: len(each)] = each
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "image_sizes": torch.tensor(sizes)}
    return {**batch, "pixel_values": torch.cat(tiles)}, padded


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_logits_loss_and_gradients_equal_transformers(tower: str) -> None:
    reference, ours = _pair(tower)
    batch, padded = _batch(ours.config)
    expected = reference(**{**batch, "pixel_values": padded})
    actual = ours(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=0)
    assert torch.equal(ours(**{**batch, "pixel_values": padded}).logits, actual.logits)
    expected.loss.backward()
    actual.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=0, msg=name)
    assert gradients["model.image_newline"].abs().max() > 0


def test_features_and_positions_in_place_of_pixels_change_nothing() -> None:
    _, ours = _pair("clip")
    batch, _ = _batch(ours.config)
    expected = ours(**batch).logits
    features = ours.encode_images(batch.pop("pixel_values"))
    torch.testing.assert_close(ours(**batch, vision_features=features).logits, expected, atol=1e-6, rtol=0)
    positions = (batch["input_ids"].flatten() == 300).nonzero().flatten()
    del batch["labels"]
    hidden = ours.model(**batch, vision_features=features, image_positions=positions).last_hidden_state
    torch.testing.assert_close(ours.lm_head(hidden), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_generation_equals_transformers(tower: str) -> None:
    reference, ours = _pair(tower)
    batch, padded = _batch(ours.config)
    end = int(batch["attention_mask"][0].sum())
    prompt = {"input_ids": batch["input_ids"][:1, :end], "max_new_tokens": 8, "do_sample": False}
    count = ours.config.tiling.num_tiles((60, 25))
    sizes = batch["image_sizes"][:1]
    expected = reference.generate(**prompt, pixel_values=padded[:1], image_sizes=sizes)
    tiles = batch["pixel_values"][:count]
    assert torch.equal(ours.generate(**prompt, pixel_values=tiles, image_sizes=sizes), expected)
    features = ours.encode_images(tiles)
    assert torch.equal(ours.generate(**prompt, vision_features=features, image_sizes=sizes), expected)


def test_checkpoints_load_either_way(tmp_path: Path) -> None:
    reference, ours = _pair("clip")
    batch, padded = _batch(ours.config)
    expected = ours(**batch).logits
    reference.save_pretrained(tmp_path / "reference")
    ours.save_pretrained(tmp_path / "ours")
    back, info = LlavaNpuForConditionalGeneration.from_pretrained(tmp_path / "reference", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(back.eval()(**batch).logits, expected)
    theirs, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(theirs.eval()(**{**batch, "pixel_values": padded}).logits, expected, atol=1e-5, rtol=0)


# ---- processor, files, pipeline ----

CONVERSATION = [{"from": "human", "value": "<image>\nWhat is it, and <image>?"}]
PICTURES = [_picture(100, 30), _picture(40, 45)]


def test_a_batch_of_prompts_equals_each_alone(composed: LoadedModel) -> None:
    model, processor = composed
    conversations = [CONVERSATION, [{"from": "human", "value": "Why?"}], [{"from": "human", "value": "<image> What?"}]]
    pictures = [PICTURES, [], PICTURES[:1]]
    together = processor.encode_prompts(conversations, pictures)
    answers = model.generate(**together, max_new_tokens=6, do_sample=False)
    for row, (conversation, of_one) in enumerate(zip(conversations, pictures, strict=True)):
        alone = processor.encode_prompts([conversation], [of_one])
        answer = model.generate(**alone, max_new_tokens=6, do_sample=False)
        assert answers[row, -6:].tolist() == answer[0, -6:].tolist()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_saved_model_is_a_llava_next_of_transformers(parts: Path, tmp_path: Path, tower: str) -> None:
    model, processor = compose(str(parts / tower), str(parts / "lm"), image_aspect_ratio="anyres")
    inputs = processor.encode_prompts([CONVERSATION], [PICTURES])
    expected = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_next"

    loaded, loaded_processor = load(tmp_path)
    again = loaded_processor.encode_prompts([CONVERSATION], [PICTURES])
    assert {name: tensor.tolist() for name, tensor in again.items()} == {n: t.tolist() for n, t in inputs.items()}
    assert torch.equal(loaded.generate(**again, max_new_tokens=6, do_sample=False), expected)
    assert loaded_processor.image_aspect_ratio == "anyres"

    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(theirs) is LlavaNextForConditionalGeneration
    their_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(their_processor) is LlavaNextProcessor
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = their_processor.apply_chat_template([message], add_generation_prompt=True)
    encoded = their_processor(images=PICTURES[:1], text=text, return_tensors="pt", add_special_tokens=False)
    ours = processor.encode_prompts([[{"from": "human", "value": "<image>\nWhat is it?"}]], [PICTURES[:1]])
    assert encoded["input_ids"].tolist() == ours["input_ids"].tolist()
    assert torch.equal(
        theirs.generate(**encoded, max_new_tokens=6, do_sample=False),
        model.generate(**ours, max_new_tokens=6, do_sample=False),
    )


def test_a_llava_next_of_transformers_opens_here(parts: Path, tmp_path: Path) -> None:
    """With resolutions in its own order, (height, width), in which a square image is wide tiles."""
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    _, ours = compose(str(parts / "clip"), str(parts / "lm"), image_aspect_ratio="anyres")
    torch.manual_seed(2)
    reference = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=tiny.clip_config(),
            text_config=tiny.text_config(len(ours.tokenizer)),
            image_token_index=ours.image_token_id,
            image_grid_pinpoints=pinpoints,
        )
    ).eval()
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        ours.tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=ours.chat_template,
    )
    reference.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded = load(tmp_path)
    for picture in (*PICTURES, _picture(28, 28)):
        text = "<image>\nWhat is it?"
        theirs = processor(images=[picture], text=text, return_tensors="pt", add_special_tokens=False)
        inputs = loaded(images=[picture], text=text, return_tensors="pt", add_special_tokens=False)
        assert inputs["input_ids"].tolist() == theirs["input_ids"].tolist()
        expected = reference.generate(**theirs, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    assert loaded.tiling.layout((28, 28)) == (1, 2)


@pytest.mark.parametrize("projector", [("mlp2x_gelu", {}), ("ldpv2", {"num_queries": 4})])
def test_pipeline_answers(parts: Path, tmp_path: Path, projector: tuple) -> None:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), *projector, image_aspect_ratio="anyres")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What is it?"}]
    answer = ask(text=[{"role": "user", "content": content}], max_new_tokens=5, do_sample=False, return_full_text=False)
    inputs = processor.encode_prompts([[{"from": "human", "value": "<image>\nWhat is it?"}]], [PICTURES[:1]])
    ids = model.eval().generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answer[0]["generated_text"] == processor.tokenizer.decode(ids[0, -5:], skip_special_tokens=True)


PROJECTORS = [
    ("linear", {}, 16),
    ("adaptive_pool", {"num_queries": 4}, 4),
    ("ldp", {}, 4),
    ("ldpv2", {"num_queries": 9}, 9),
    ("pixel_shuffle", {}, 4),
    ("tokenpacker", {"region_layers": [1, 2]}, 4),
    ("c_abstractor", {"num_queries": 4, "hidden_size": 16}, 4),
]


@pytest.mark.parametrize(("projector", "options", "tokens"), PROJECTORS)
def test_projectors_keep_the_picture_in_place(parts: Path, projector: str, options: dict, tokens: int) -> None:
    """Each tile's tokens in its own quarter of the map."""
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), projector, options, image_aspect_ratio="anyres")
    picture = _picture(56, 56)
    assert processor.tiling.layout((56, 56)) == (2, 2)
    side = round(tokens**0.5)
    assert processor.count_image_tokens((56, 56)) == tokens + 2 * side * (2 * side + 1)
    inner = model.eval().model
    features = model.encode_images(processor.preprocess_images([picture]))
    each = inner.project(features)  # (5, tokens, hidden)
    packed = inner.get_image_features(vision_features=features, image_sizes=[(56, 56)]).pooler_output[0]
    assert torch.equal(packed[:tokens], each[0])
    rows = packed[tokens:].unflatten(0, (2 * side, 2 * side + 1))
    assert torch.equal(rows[:, -1], inner.image_newline.expand(2 * side, -1))
    for number, (top, left) in enumerate([(0, 0), (0, side), (side, 0), (side, side)], start=1):
        assert torch.equal(rows[top : top + side, left : left + side].flatten(0, 1), each[number])


FLAT = [("resampler", {"num_queries": 4}, False, 4), ("mlp2x_gelu", {}, True, 17), ("linear", {}, True, 17)]


@pytest.mark.parametrize(("projector", "options", "special_tokens", "tokens"), FLAT)
def test_tokens_without_places_follow_each_other(
    parts: Path, tmp_path: Path, projector: str, options: dict, special_tokens: bool, tokens: int
) -> None:
    """Reference: LLaVA's `mm_patch_merge_type: flat`, the whole image's tokens and then each tile's, nothing else."""
    model, processor = compose(
        str(parts / "clip"), str(parts / "lm"), projector, options, keep_prefix_tokens=special_tokens,
        image_aspect_ratio="anyres",
    )  # fmt: skip
    sizes = [(56, 56), (20, 90)]  # (height, width)
    assert [processor.tiling.num_tiles(size) for size in sizes] == [5, 4]
    assert [processor.count_image_tokens(size) for size in sizes] == [5 * tokens, 4 * tokens]
    inner = model.eval().model
    assert inner.image_newline is None
    features = model.encode_images(processor.preprocess_images([_picture(56, 56), _picture(90, 20)]))
    each = inner.project(features)
    packed = inner.get_image_features(vision_features=features, image_sizes=sizes).pooler_output
    assert torch.equal(packed[0], each[:5].flatten(0, 1))
    assert torch.equal(packed[1], each[5:].flatten(0, 1))

    expected = _answer(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_npu"
    )  # LLaVA-NeXT has no such form
    loaded, loaded_processor = load(tmp_path)
    assert loaded_processor.tiling == processor.tiling
    assert _answer(loaded, loaded_processor) == expected


def _answer(model: LlavaNpuForConditionalGeneration, processor: LlavaNpuProcessor) -> list[int]:
    inputs = processor.encode_prompts([[{"from": "human", "value": "<image>\nWhat is it?"}]], [PICTURES[:1]])
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()


@pytest.mark.slow
def test_a_model_of_squares_goes_on_with_tiles_and_gets_a_newline_only_where_rows_end(parts: Path) -> None:
    for projector, options, newline in (("resampler", {"num_queries": 4}, False), ("ldpv2", {"num_queries": 4}, True)):
        model, processor = compose(str(parts / "clip"), str(parts / "lm"), projector, options)
        processor = change_aspect_ratio(LoadedModel(model, processor), "anyres").processor
        assert (model.model.image_newline is not None) is newline
        assert processor.tiling == model.config.tiling
        _answer(model.eval(), processor)
        change_aspect_ratio(LoadedModel(model, processor), "pad")
        assert model.model.image_newline is None


def test_each_tile_at_several_scales(parts: Path) -> None:
    """Reference: each tile, an image of its own, through the same weights without anyres."""
    common = {"projector_type": "ldpv2", "projector_options": {"num_queries": 4}, "scales": [1, 2]}
    squares, _ = compose(str(parts / "clip"), str(parts / "lm"), **common)
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), image_aspect_ratio="anyres", **common)
    assert processor.tiling == model.config.tiling
    assert processor.tiling.tile_size == (56, 56)
    assert model.config.image_grid_pinpoints[0] == [112, 56]
    tiles = processor.preprocess_images([_picture(112, 112)])
    assert tiles.shape == (5, 3, 56, 56)
    assert processor.count_image_tokens((112, 112)) == 4 + 4 * (4 + 1)
    features = model.eval().encode_images(tiles)
    alone = torch.cat([squares.eval().encode_images(tile[None]) for tile in tiles])
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)
    _answer(model, processor)


# ---- what may be wrong ----


def test_errors_say_what_works(parts: Path) -> None:
    clip, lm = str(parts / "clip"), str(parts / "lm")
    with pytest.raises(UserError, match=r"\[30, 56\] must be a pair of multiples .*28×28"):
        compose(clip, lm, image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 30]])
    with pytest.raises(UserError, match="must be a pair"):
        compose(clip, lm, image_aspect_ratio="anyres", image_grid_pinpoints=[[56]])
    with pytest.raises(UserError, match="belong to image_aspect_ratio 'anyres', not 'pad'"):
        compose(clip, lm, image_grid_pinpoints=[[56, 28]])
    with pytest.raises(UserError, match=r"\[28, 56\] must be a pair of multiples .*56×56"):  # tiles at twice the size
        compose(clip, lm, scales=[1, 2], image_aspect_ratio="anyres", image_grid_pinpoints=[[56, 28]])


def test_sizes_are_asked_for_and_compared(composed: LoadedModel) -> None:
    model, processor = composed
    inputs = processor.encode_prompts([CONVERSATION], [PICTURES])
    sizes = inputs.pop("image_sizes")
    with pytest.raises(UserError, match="give image_sizes"):
        model(**inputs)
    with pytest.raises(UserError, match=r"tiles are given, but images of .* make"):
        model(**inputs, image_sizes=torch.cat([sizes, sizes]))
    with pytest.raises(UserError, match="image tokens, the images give"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 60:], "attention_mask": None}, image_sizes=sizes)
