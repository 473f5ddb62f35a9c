"""Tiny models, tokenizers and data for tests: random weights, real formats, built in about a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML, as SmolLM2's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    inner.train_from_iterator(["a red square, a green square, a blue square. What is it?"] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHATML
    return wrapped


def text_config(vocab_size: int = 303, **changes: object) -> LlamaConfig:
    values = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**values, **changes})


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )


def siglip_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        vision_use_head=False,
    )


def write_language_model(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    model = LlamaForCausalLM(text_config(len(words), **{"tie_word_embeddings": True, **changes}))
    model.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    torch.manual_seed(1)
    CLIPVisionModel(clip_config()).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def write_siglip(folder: Path) -> Path:
    torch.manual_seed(1)
    SiglipVisionModel(siglip_config()).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def write_resnet(folder: Path) -> Path:
    """A tower with batch normalisation: 96-pixel images, a 3×3 grid of 32 channels."""
    torch.manual_seed(3)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetModel(config).eval().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


def write_records(folder: Path, count: int = 24) -> Path:
    """Images of one colour each with the question what they are, one text-only record and one with two images."""
    noise = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        colour = list(COLOURS)[number % 3]
        pixels = np.full((20, 30, 3), COLOURS[colour]) + noise.integers(-10, 10, (20, 30, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{number}.png")
        question = {"from": "human", "value": "<image>\nWhat is it?"}
        answer = {"from": "gpt", "value": f"a {colour} square"}
        records.append({"id": str(number), "image": f"images/{number}.png", "conversations": [question, answer]})
    records.append({"id": "text", "conversations": _turns("What is it?", "a square")})
    records.append(
        {
            "id": "two",
            "image": ["images/0.png", "images/1.png"],
            "conversations": _turns("Is <image> or <image> red?", "red, green"),
        }
    )
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


def write_captions(folder: Path, count: int = 24) -> Path:
    """As `write_records`, without the records that the template `plain` has no place for."""
    records = json.loads(write_records(folder, count).read_text())
    path = folder / "captions.json"
    path.write_text(json.dumps([record for record in records if record["id"] not in ("text", "two")]))
    return path


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
