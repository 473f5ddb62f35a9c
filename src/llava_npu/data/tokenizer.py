"""Loading a tokenizer by itself, for looking at data without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; of the latter no weights are fetched.

    Raises:
        UserError: there is none.
    """
    from llava_npu.models.hubs import local_folder

    try:
        return open_tokenizer(local_folder(name, "--tokenizer", weights=False))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--tokenizer {name}: no tokenizer could be loaded from there: {reason}") from error


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    A Llama's that is a sentencepiece model alone is opened as such: by itself, or beside a config.json that says
    "llava", transformers 5 reads it as something else, without the space before a piece of text that LLaVA was trained
    with, and without `<s>`.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    return (LlamaTokenizer if _is_llama_sentencepiece(folder) else AutoTokenizer).from_pretrained(folder)


def _is_llama_sentencepiece(folder: Path) -> bool:
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return False
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return isinstance(values, dict) and values.get("tokenizer_class", "LlamaTokenizer").startswith("LlamaTokenizer")
