"""What several benchmarks are made of: small models of random weights, their tokenizers, data, and runs of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llava_npu.config import RunConfig
from llava_npu.models import compose

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "what", "is", "it", "a", "red", "square", "?", "USER", ":", "ASSISTANT")
# Projectors that a grid of settings compares, with their options.
PROJECTORS: dict[str, dict[str, Any]] = {
    "mlp2x_gelu": {},
    "resampler": {"num_queries": 16},
    "c_abstractor": {"num_queries": 16, "hidden_size": 64},
    "tokenpacker": {"region_layers": [1, 2], "num_heads": 4},
}


def write_tower(folder: Path, width: int, layers: int, *, side: int, heads: int = 4, inner: int | None = None) -> None:
    """A CLIP tower with patches of 14 × 14 pixels.

    Args:
        side: of its images, in pixels.
        inner: width within its MLPs; by default four times `width`.
    """
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)


def write_language_model(
    folder: Path, config: LlamaConfig, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float32
) -> None:
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(tokens: int = len(WORDS)) -> PreTrainedTokenizerFast:
    """Of `WORDS`, and of others that no text has, up to so many."""
    words = {word: number for number, word in enumerate(WORDS)}
    words |= {f"word{number}": number for number in range(len(words), tokens)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and ChatML's marks; 0 is padding, 2 the end."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(names[:3])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def write_llava(folder: Path, width: int, layers: int, *, tower: dict[str, Any], **language: Any) -> Path:
    """A model that answers in bytes, with an MLP projector.

    Args:
        tower: arguments of `write_tower`.
        language: changes of the language model's configuration.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    write_language_model(folder / "language", LlamaConfig(**config, **language), tokenizer)
    write_tower(folder / "vision", **tower)
    loaded = compose(str(folder / "vision"), str(folder / "language"), template="chatml")
    print(f"{sum(each.numel() for each in loaded.model.parameters()) / 1e6:.0f} M weights", flush=True)
    loaded.save_pretrained(folder)
    return folder


def write_records(folder: Path, squares: Iterable[int]) -> None:
    """`data.json`: images, each with a question and an answer that says "a red square" so many times."""
    records = []
    for number, times in enumerate(squares):
        name = f"{number}.png"
        Image.new("RGB", (40, 30), (number * 8 % 256, 30, 30)).save(folder / name)
        turns = [("human", "<image>\nwhat is it ?"), ("gpt", "a red square " * times)]
        conversation = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": name, "image": name, "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(records))


def run_config(material: Path, output: Path, stage: str, projector: str = "mlp2x_gelu", **changes: Any) -> RunConfig:
    """A run on `material`: its `tower`, its `language_model`, and its `data.json` unless `changes` say otherwise."""
    data = {"path": "data.json", "template": "plain" if stage == "align" else "v1", "workers": 0}
    data |= changes.pop("data", {})
    return RunConfig.model_validate(
        {
            "output": str(output),
            "stage": stage,
            "model": {
                "vision_tower": str(material / "tower"),
                "language_model": str(material / "language_model"),
                "projector": projector,
                "projector_options": PROJECTORS[projector],
            },
            "data": {**data, "path": str(material / str(data["path"]))},
            **changes,
        }
    )


def varied_squares(count: int) -> list[int]:
    """For answers of very different lengths."""
    draw = random.Random(0)
    return [draw.choice((4, 8, 16, 50)) for _ in range(count)]
