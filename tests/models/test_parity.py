"""Logits, loss and gradients equal those of `transformers.LlavaForConditionalGeneration` with the same weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_npu import LlavaNpuConfig, LlavaNpuForConditionalGeneration
from support import tiny

IMAGE_TOKEN_ID = 300
TOWERS = {"clip": (tiny.clip_config, "default"), "siglip": (tiny.siglip_config, "full")}


def _pair(tower: str) -> tuple[LlavaForConditionalGeneration, LlavaNpuForConditionalGeneration]:
    vision_config, strategy = TOWERS[tower]
    torch.manual_seed(0)
    reference = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config(),
            text_config=tiny.text_config(),
            image_token_index=IMAGE_TOKEN_ID,
            vision_feature_select_strategy=strategy,
        )
    ).eval()
    ours = LlavaNpuForConditionalGeneration(
        LlavaNpuConfig(vision_config=vision_config(), text_config=tiny.text_config(), image_token_index=IMAGE_TOKEN_ID)
    ).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def _batch() -> dict[str, torch.Tensor]:
    """Two samples, the first with one image and padding on the right, the second with two images."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, 290, (2, 48))
    input_ids[0, 4:20] = IMAGE_TOKEN_ID
    input_ids[1, 0:16] = IMAGE_TOKEN_ID
    input_ids[1, 18:34] = IMAGE_TOKEN_ID
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 40:] = 0
    labels = input_ids.clone()
    labels[:, :36] = -100
    labels[attention_mask == 0] = -100
    pixel_values = torch.randn(3, 3, 28, 28)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": pixel_values,
    }


@pytest.mark.parametrize("tower", TOWERS)
def test_logits_loss_and_gradients_equal_transformers(tower: str) -> None:
    reference, ours = _pair(tower)
    assert ours.config.num_image_tokens == 16  # SigLIP has no class token: no patch is dropped
    batch = _batch()
    expected, actual = reference(**batch), ours(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=0)
    expected.loss.backward()
    actual.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    compared = 0
    for name, parameter in reference.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=0, msg=name)
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("tower", TOWERS)
def test_checkpoints_load_either_way(tower: str, tmp_path: Path) -> None:
    reference, ours = _pair(tower)
    batch = _batch()
    expected = reference(**batch).logits
    reference.save_pretrained(tmp_path / "reference")
    ours.save_pretrained(tmp_path / "ours")
    for model_class, folder in (
        (LlavaForConditionalGeneration, "ours"),
        (LlavaNpuForConditionalGeneration, "reference"),
    ):
        loaded, info = model_class.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(loaded.eval()(**batch).logits, expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_generation_equals_transformers_and_takes_cached_features(tower: str) -> None:
    reference, ours = _pair(tower)
    batch = _batch()
    prompt = {
        "input_ids": batch["input_ids"][1:, :40],
        "attention_mask": batch["attention_mask"][1:, :40],
        "max_new_tokens": 8,
        "do_sample": False,
    }
    images = batch["pixel_values"][1:]
    expected = reference.generate(**prompt, pixel_values=images)
    assert torch.equal(ours.generate(**prompt, pixel_values=images), expected)
    assert torch.equal(ours.generate(**prompt, vision_features=ours.encode_images(images)), expected)


def test_features_in_place_of_pixels_change_nothing() -> None:
    _, ours = _pair("clip")
    batch = _batch()
    expected = ours(**batch).logits
    features = ours.encode_images(batch.pop("pixel_values"))
    assert features.shape == (3, 16, 32)
    assert torch.equal(ours(**batch, vision_features=features).logits, expected)


def test_several_feature_layers_equal_transformers() -> None:
    torch.manual_seed(0)
    common = {"text_config": tiny.text_config(), "image_token_index": IMAGE_TOKEN_ID, "vision_feature_layer": [1, -2]}
    reference = LlavaForConditionalGeneration(LlavaConfig(vision_config=tiny.clip_config(), **common)).eval()
    ours = LlavaNpuForConditionalGeneration(
        LlavaNpuConfig(vision_config=tiny.clip_config(), **copy.deepcopy(common))
    ).eval()
    ours.load_state_dict(reference.state_dict())
    batch = _batch()
    torch.testing.assert_close(ours(**batch).logits, reference(**batch).logits, atol=1e-5, rtol=0)
