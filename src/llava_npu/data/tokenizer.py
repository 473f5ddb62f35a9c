"""Loading a tokenizer by itself, for looking at data without a model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.errors import UserError
from llava_npu.files.json_objects import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; of the latter no weights are fetched.

    Raises:
        UserError: there is none, or not the whole of it.
    """
    from llava_npu.hub.hubs import local_folder

    folder = local_folder(name, "--tokenizer", weights=False)
    if not folder.exists():
        raise UserError(f"--tokenizer: {name} does not exist. Give a folder with a tokenizer, or a model on a hub.")
    return open_tokenizer(folder, "--tokenizer")


def open_tokenizer(folder: Path, field: str, config: Any = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, which the setting `field` names.

    A Llama's that is a sentencepiece model alone is opened as such: by itself, or next to a config.json that says
    "llava", transformers 5 reads it as something else, without the space before a piece of text that LLaVA was trained
    with, and without `<s>`.

    Args:
        config: stands for the folder's config.json where that one is not transformers' own.

    Raises:
        UserError: there is none, or not the whole of it.
    """
    from llava_npu.hub.folders import check_any_file, open_part

    check_any_file(folder, _FILES, field, "tokenizer")
    try:
        tokenizer = open_part(lambda: _open(folder, field, config), f"{field} (tokenizer)", str(folder))
    except UserError as error:
        if "untagged enum" not in str(error):
            raise
        raise UserError(
            f"{field}: {folder / 'tokenizer.json'} holds what tokenizers {version('tokenizers')} does not know: it was "
            "saved by a newer release. Upgrade tokenizers and transformers, or save the tokenizer again with these."
        ) from error
    if tokenizer.eos_token is None and not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{field}: {folder} has no tokenizer_config.json, which says with which tokens texts begin and end. "
            "Download or copy the folder again."
        )
    return tokenizer


def _open(folder: Path, field: str, config: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, LlamaTokenizer

    if _is_llama_sentencepiece(folder, field):
        return LlamaTokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, config=config)


def _is_llama_sentencepiece(folder: Path, field: str) -> bool:
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return False
    settings = folder / "tokenizer_config.json"
    values = read_json(settings, field) if settings.is_file() else {}
    return str(values.get("tokenizer_class", "LlamaTokenizer")).startswith("LlamaTokenizer")
