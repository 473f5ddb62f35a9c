"""Hugging Face's LLaVA, and this package's own models, which share its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.models.checkpoints.checkpoint import Checkpoint, Weights, checked
from llava_npu.models.checkpoints.remote_code import write_remote_code
from llava_npu.models.checkpoints.weight_files import find_weights, write_weights
from llava_npu.models.checkpoints.weight_names import hub_name
from llava_npu.models.loaded import load_processor, open_config

# What transformers does not write again, or what other programs look for next to the weights.
COMPANIONS = ("tokenizer.model", "generation_config.json")


def read_hugging_face(folder: Path) -> Checkpoint:
    """A folder with Hugging Face's LLaVA, in any of its spellings, or with one of our own models.

    Raises:
        UserError: a file is missing or damaged.
    """
    source = str(folder)
    config = open_config(folder, "model")
    files = find_weights(folder)
    if files is None:
        raise UserError(f"{folder}: has a config.json but no weights.")

    def weights() -> Weights:
        for name, tensor in files:
            renamed = hub_name(name, config.tower.kind)
            if renamed is not None:
                yield renamed, tensor

    return Checkpoint(
        source=source,
        layout="llava-npu" if not config.is_plain_llava else "hf",
        config=config,
        processor=load_processor(source, config),
        weights=weights,
        num_bytes=files.num_bytes,
        companions=tuple(folder / name for name in COMPANIONS if (folder / name).is_file()),
    )


def write_hugging_face(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    """Writes a folder that transformers opens (as plain LLaVA where it is one), with the names that vLLM reads.

    A model that transformers has no code for gets it next to the weights (`remote_code`).
    """
    write_weights(folder, checked(checkpoint), shard_bytes)
    checkpoint.processor.save_pretrained(folder)
    checkpoint.config.save_pretrained(folder)
    if not checkpoint.config.is_plain_llava:
        write_remote_code(folder)
    for path in checkpoint.companions:
        (folder / path.name).write_bytes(path.read_bytes())


def is_hugging_face(values: dict[str, Any]) -> bool:
    """Whether a config.json is one of Hugging Face's LLaVA: it describes the tower and the language model."""
    return "vision_config" in values and "text_config" in values
