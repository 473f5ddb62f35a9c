"""Joining a tower, a projector and a language model; saving; loading; what may go wrong with the folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPConfig, CLIPModel, LlavaProcessor, ResNetModel

from llava_npu import LlavaNpuForConditionalGeneration, LlavaNpuProcessor, UserError
from llava_npu.models import compose, load
from support import tiny

PROJECTORS = [
    ("mlp2x_gelu", {}, 16),
    ("linear", {}, 16),
    ("mlp3x_gelu", {}, 16),
    ("ldpv2", {"num_queries": 4}, 4),
]


def _answer(model: LlavaNpuForConditionalGeneration, processor: LlavaNpuProcessor) -> list[int]:
    picture = Image.new("RGB", (40, 20), (200, 30, 30))
    prompts = [[{"from": "human", "value": "<image>\nWhat is it?"}], [{"from": "human", "value": "What?"}]]
    inputs = processor.encode_prompts(prompts, [[picture], []])
    return model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("projector", "options", "tokens"), PROJECTORS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_saved_model_answers_as_before(
    parts: Path, tmp_path: Path, tower: str, projector: str, options: dict, tokens: int
) -> None:
    model, processor = compose(str(parts / tower), str(parts / "lm"), projector, options)
    assert processor.num_image_tokens == model.config.num_image_tokens == tokens
    expected = _answer(model.eval(), processor)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")

    loaded, loaded_processor = load(tmp_path / "saved")
    assert _answer(loaded, loaded_processor) == expected
    assert loaded.config.projector_type == projector
    assert loaded_processor.template == "tokenizer"

    # transformers' own doors
    automatic = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert _answer(automatic, loaded_processor) == expected
    automatic_processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    picture = Image.new("RGB", (40, 20))
    inputs = automatic_processor(images=picture, text="<image>\nWhat is it?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens
    plain = projector == "mlp2x_gelu"
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == ("llava" if plain else "llava_npu")
    assert type(automatic_processor) is (LlavaProcessor if plain else LlavaNpuProcessor)


@pytest.mark.slow
def test_composing_twice_with_a_seed_gives_the_same_weights(parts: Path) -> None:
    first, _ = compose(str(parts / "clip"), str(parts / "lm"), seed=7)
    again, _ = compose(str(parts / "clip"), str(parts / "lm"), seed=7)
    other, _ = compose(str(parts / "clip"), str(parts / "lm"), seed=8)
    name = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_pretrained_weights_arrive_unchanged(parts: Path) -> None:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"))
    words = load_file(parts / "lm/model.safetensors")["model.embed_tokens.weight"]
    embedded = model.get_input_embeddings().weight
    assert torch.equal(embedded[: len(words)], words)
    assert embedded.shape[0] % 64 == 0
    assert embedded.shape[0] >= len(processor.tokenizer)
    assert model.lm_head.weight is embedded  # tied, as in the language model


def test_the_vision_half_of_a_whole_clip_is_enough(parts: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(vision_config=tiny.clip_config().to_dict(), text_config=text)).eval()
    whole.save_pretrained(tmp_path / "whole")
    shutil.copy(parts / "clip/preprocessor_config.json", tmp_path / "whole")
    model, _ = compose(str(tmp_path / "whole"), str(parts / "lm"))
    pixel_values = torch.randn(1, 3, 28, 28)
    expected = whole.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.eval().encode_images(pixel_values), expected, atol=1e-6, rtol=0)


def test_a_convolutional_tower_gives_its_feature_map_as_tokens(parts: Path, tmp_path: Path) -> None:
    tower = ResNetModel.from_pretrained(tiny.write_resnet(tmp_path / "resnet"))
    model, processor = compose(str(tmp_path / "resnet"), str(parts / "lm"), "linear", vision_feature_layer=-1)
    assert processor.num_image_tokens == 9
    pixel_values = torch.randn(2, 3, 96, 96)
    feature_map = tower(pixel_values).last_hidden_state  # (2, 32, 3, 3)
    tokens = model.eval().encode_images(pixel_values)
    assert torch.allclose(tokens[1, 5], feature_map[1, :, 1, 2])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved")[1].num_image_tokens == 9
    with pytest.raises(UserError, match="differ in grid"):
        compose(str(tmp_path / "resnet"), str(parts / "lm"), "linear", vision_feature_layer=-2)


def test_special_tokens_of_the_tower(parts: Path) -> None:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), keep_prefix_tokens=True)
    assert processor.num_image_tokens == 17
    assert model.encode_images(torch.zeros(1, 3, 28, 28)).shape[1] == 17
    with pytest.raises(UserError, match="class or register"):
        compose(str(parts / "clip"), str(parts / "lm"), "ldpv2", {"num_queries": 4}, keep_prefix_tokens=True)


# ---- what may be wrong ----


@pytest.fixture
def saved(parts: Path, tmp_path: Path) -> Path:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), "ldpv2", {"num_queries": 4})
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "has no tokenizer: none of the files tokenizer.json"),
        ("processor_config.json", "has no image processor: none of the files preprocessor_config.json"),
    ],
)
def test_a_missing_file_is_named(saved: Path, file: str, message: str) -> None:
    (saved / file).unlink()
    with pytest.raises(UserError, match=message):
        load(saved)


def test_missing_and_foreign_weights_are_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    key = next(name for name in weights if "multi_modal_projector" in name)
    weights["stray.weight"] = weights.pop(key)
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as raised:
        load(saved)
    assert "multi_modal_projector" in str(raised.value)
    assert "stray.weight" in str(raised.value)


def test_a_projector_of_another_shape_names_both_shapes(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    key = next(name for name in weights if "multi_modal_projector" in name and weights[name].ndim == 2)
    weights[key] = weights[key][:, :-1].contiguous()
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"multi_modal_projector.*\(48, 31\).*\(48, 32\)"):
        load(saved)


def test_damaged_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*Download or copy it again"):
        load(saved)


def test_a_tokenizer_without_the_image_token(saved: Path) -> None:
    tiny.tokenizer().save_pretrained(saved)
    with pytest.raises(UserError, match="no <image> token with id"):
        load(saved)


def test_no_such_folder(tmp_path: Path, parts: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.vision_tower.*is not a folder"):
        compose(str(tmp_path / "nowhere"), str(parts / "lm"))


def test_unknown_projector_names_the_nearest(parts: Path) -> None:
    with pytest.raises(UserError, match=r"ldpv3.*Did you mean 'ldpv2'"):
        compose(str(parts / "clip"), str(parts / "lm"), "ldpv3")


def test_identity_needs_a_tower_of_the_language_model_s_width(parts: Path) -> None:
    with pytest.raises(UserError, match="gives the tower's 32 channels, but the language model takes 48"):
        compose(str(parts / "clip"), str(parts / "lm"), "identity")


def test_layer_outside_the_tower(parts: Path) -> None:
    with pytest.raises(UserError, match="has 3 layers"):
        compose(str(parts / "clip"), str(parts / "lm"), vision_feature_layer=-9)
    with pytest.raises(UserError, match=r"12, 16, 22, 23 too \(its `region_layers`\).* 3 layers"):
        compose(str(parts / "clip"), str(parts / "lm"), "tokenpacker")
