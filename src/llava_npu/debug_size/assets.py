"""Tiny models with random weights, and images with captions and conversations, in the formats of real ones.

The vision tower has the 24 layers of CLIP-L, of which projectors choose, and a grid of 12×12 patches, on which every
projector can work; its widths are tiny.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llava_npu.config import RunConfig
from llava_npu.config.recipes import find_writer
from llava_npu.debug_size.config import ASSETS, FOLDER, QUESTIONS
from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.cache import build_once

_COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 60, 220), "yellow": (230, 210, 50)}
_IMAGES = 16
_SIZE = 12 * 14  # pixels a side


def prepare(config: RunConfig) -> None:
    """Makes what a run at debug size needs.

    Raises:
        UserError: it starts from another run that has not run at debug size.
    """
    make_assets(ASSETS)
    before = config.model.checkpoint
    if before is not None and Path(before).parent == FOLDER and not Path(before).is_dir():
        writer = find_writer(f"runs/{Path(before).name}", projector=config.model.projector)
        command = [writer.path.stem, *writer.overrides] if writer else [Path(before).name]
        raise UserError(
            f"model.checkpoint: {before} does not exist: the run that writes it has not run at debug size. First: "
            f"llava-npu train {' '.join(command)} --debug-size"
        )


def make_questions(folder: Path) -> None:
    """Writes questions about the colours of the images in `folder`, unless they are there."""
    if (folder / QUESTIONS).is_file():
        return
    colours = list(_COLOURS)
    rows = ["\t".join(["index", "question", *"ABCD", "answer", "image_path"])]
    for number in range(_IMAGES):
        right = "ABCD"[number % len(colours)]
        rows.append("\t".join([str(number), "What is it?", *map(_caption, colours), right, f"images/{number}.png"]))
    write_text(folder / QUESTIONS, "\n".join(rows) + "\n")


def make_assets(folder: Path) -> None:
    """Writes `clip`, `llama`, `captions.json` and `conversations.json`, unless they are there."""
    build_once(folder, _write_assets)


def _write_assets(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _write_clip(folder / "clip")
        _write_llama(folder / "llama")
    _write_data(folder)


def _write_clip(folder: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=24,
        num_attention_heads=2,
        image_size=_SIZE,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": _SIZE}, crop_size={"height": _SIZE, "width": _SIZE})
    processor.save_pretrained(folder)


def _write_llama(folder: Path) -> None:
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of Llama, so that LLaVA's templates hold."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    text = "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: What colour is it?"
    inner.train_from_iterator([text, *(_caption(colour) for colour in _COLOURS)], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )


def _write_data(folder: Path) -> None:
    noise = np.random.default_rng(0)
    (folder / "images").mkdir()
    captions, conversations = [], []
    for number in range(_IMAGES):
        colour = list(_COLOURS)[number % len(_COLOURS)]
        pixels = np.array(_COLOURS[colour]) + noise.integers(-20, 20, (48, 64, 3))
        name = f"images/{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        record = {"id": str(number), "image": name}
        captions.append({**record, "conversations": _turns("<image>\nDescribe it.", _caption(colour))})
        turns = [*_turns("<image>\nWhat colour is it?", colour), *_turns("Are you sure?", f"Yes, {colour}.")]
        conversations.append({**record, "conversations": turns})
    conversations[-1] = {"id": "text", "conversations": _turns("Which colour has grass?", "green")}
    (folder / "captions.json").write_text(json.dumps(captions, indent=1), encoding="utf-8")
    (folder / "conversations.json").write_text(json.dumps(conversations, indent=1), encoding="utf-8")


def _caption(colour: str) -> str:
    return f"a {colour} picture"


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
