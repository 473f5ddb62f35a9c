"""Prompts and pixels: the same from every door, counts checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BitImageProcessor, Dinov2Config, Dinov2Model, LlavaProcessor, pipeline

from llava_npu import LlavaNpuProcessor, UserError
from llava_npu.data.conversation.labels import encode_conversation
from llava_npu.models import compose, load
from llava_npu.models.loaded import LoadedModel

QUESTION = [{"from": "human", "value": "<image>\nWhat is it?"}]
PICTURE = Image.new("RGB", (40, 20), (200, 30, 30))


@pytest.fixture(scope="module")
def composed(parts: Path) -> LoadedModel:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), "ldpv2", {"num_queries": 4})
    return LoadedModel(model.eval(), processor)


@pytest.fixture(scope="module")
def processor(composed: tuple) -> LlavaNpuProcessor:
    return composed[1]


def test_a_prompt_is_the_beginning_of_the_training_sample(processor: LlavaNpuProcessor) -> None:
    prompt = processor.encode_prompts([QUESTION], [[PICTURE]])["input_ids"][0].tolist()
    whole = encode_conversation([*QUESTION, {"from": "gpt", "value": "a cat"}], processor.tokenizer, processor.template)
    placeholder = whole.input_ids.index(-200)
    expanded = [*whole.input_ids[:placeholder], *[processor.image_token_id] * 4, *whole.input_ids[placeholder + 1 :]]
    assert expanded[: len(prompt)] == prompt


def test_batches_are_padded_on_the_left(processor: LlavaNpuProcessor) -> None:
    batch = processor.encode_prompts([QUESTION, [{"from": "human", "value": "Why?"}]], [[PICTURE], []])
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"][1, 0] == 0
    assert batch["attention_mask"][1, -1] == 1
    assert batch["pixel_values"].shape == (1, 3, 28, 28)


def test_batched_generation_equals_one_at_a_time(
    composed: LoadedModel,
) -> None:
    model, processor = composed
    prompts = [QUESTION, [{"from": "human", "value": "What else is there to see here?"}]]
    pictures: list[list[Image.Image]] = [[PICTURE], []]
    together = model.generate(**processor.encode_prompts(prompts, pictures), max_new_tokens=6, do_sample=False)
    for row, (prompt, images) in enumerate(zip(prompts, pictures, strict=True)):
        alone = model.generate(**processor.encode_prompts([prompt], [images]), max_new_tokens=6, do_sample=False)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize("pictures", [[], [PICTURE, PICTURE]])
def test_image_counts_are_checked(processor: LlavaNpuProcessor, pictures: list[Image.Image]) -> None:
    with pytest.raises(UserError, match=f"1 <image> in the text, but {len(pictures)} images"):
        processor.encode_prompts([QUESTION], [pictures])
    if pictures:
        with pytest.raises(UserError, match=f"the text has 1 <image>, but {len(pictures)} images"):
            processor(text="<image> What?", images=pictures)


def test_the_model_checks_image_tokens_against_features(
    composed: LoadedModel,
) -> None:
    model, processor = composed
    batch = processor.encode_prompts([QUESTION], [[PICTURE]])
    with pytest.raises(UserError, match="1 images in the text, 2 given"):
        model(**{**batch, "pixel_values": torch.cat([batch["pixel_values"]] * 2)})


def test_pictures_of_the_wrong_size_are_refused(
    composed: LoadedModel,
) -> None:
    with pytest.raises(UserError, match=r"\(56, 28\) pixels"):
        composed[0].encode_images(torch.zeros(1, 3, 56, 28))


def test_pad_keeps_the_whole_picture_and_square_crops_it(parts: Path) -> None:
    picture = Image.new("RGB", (56, 28), (255, 0, 0))
    _, padded = compose(str(parts / "clip"), str(parts / "lm"), image_aspect_ratio="pad")
    _, square = compose(str(parts / "clip"), str(parts / "lm"), image_aspect_ratio="square")
    top, middle = padded.preprocess_images([picture])[0, :, 0, 14], padded.preprocess_images([picture])[0, :, 14, 14]
    assert top.abs().max() < 0.02  # the mean colour, normalised
    assert middle[0] > 1.5
    assert torch.allclose(square.preprocess_images([picture])[0, :, 0, 14], middle)


def test_chat_template_builds_the_prompt_of_training(processor: LlavaNpuProcessor) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ours = processor.encode_prompts([QUESTION], [[PICTURE]])
    assert processor(text=text, images=PICTURE, return_tensors="pt")["input_ids"].tolist() == ours["input_ids"].tolist()


@pytest.mark.parametrize("template", ["v1", "llama_2", "mistral", "chatml", "tokenizer"])
def test_every_template_has_an_equal_chat_template(parts: Path, template: str) -> None:
    _, processor = compose(str(parts / "clip"), str(parts / "lm"), template=template)
    conversation = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "Which colour?"},
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": "Which colour?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor(text=text, images=PICTURE, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == processor.encode_prompts([conversation], [[PICTURE]])["input_ids"].tolist()


def test_pipeline_answers(parts: Path, tmp_path: Path) -> None:
    model, processor = compose(str(parts / "clip"), str(parts / "lm"), "ldpv2", {"num_queries": 4})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}]}
    ]
    answer = ask(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = model.generate(**processor.encode_prompts([QUESTION], [[PICTURE]]), max_new_tokens=5, do_sample=False)
    expected = processor.tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
    assert answer == expected


def _write_dinov2(folder: Path) -> Path:
    size = {"height": 28, "width": 28}
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_every_tool_pads_images_as_training_did(parts: Path, tmp_path: Path, tower: str) -> None:
    """Hugging Face's own processor, which plain LLaVA models are opened with, on an image that is not square."""
    source = _write_dinov2(tmp_path / tower) if tower == "dinov2" else parts / tower
    model, processor = compose(str(source), str(parts / "lm"))
    for number in ("first", "again"):  # what was saved and loaded is saved the same
        folder = tmp_path / number
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        theirs = AutoProcessor.from_pretrained(folder)
        assert type(theirs) is LlavaProcessor
        pixels = theirs(images=PICTURE, text="<image>", return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, processor.preprocess_images([PICTURE]), atol=0, rtol=0)
        # vLLM chooses by this name; our plug-in says what vLLM's LLaVA cannot do.
        (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
        assert architecture == ("LlavaNpu" if tower == "dinov2" else "Llava") + "ForConditionalGeneration"
        model, processor = load(folder)
