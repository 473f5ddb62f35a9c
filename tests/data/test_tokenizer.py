"""A Llama's sentencepiece model alone, as LLaVA's own folders hold it: ids of `LlamaTokenizer(legacy=False)`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llava_npu.data.conversation.labels import encode_conversation
from llava_npu.data.tokenizer import load_tokenizer
from llava_npu.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": {"model_type": "llava"}},
        {"config.json": {"model_type": "mistral"}},
        {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}},
    ],
    ids=["alone", "llava", "mistral", "settings"],
)
def test_sentencepiece(
    files: dict[str, Any], llama_folder: Path, llama: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").symlink_to(llama_folder / "tokenizer.model")
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    tokenizer = load_tokenizer(str(tmp_path))
    assert encode_conversation(TURNS, tokenizer) == encode_conversation(TURNS, llama)


def test_settings_that_are_no_json(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(llama_folder / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"--tokenizer: .*tokenizer_config\.json is damaged"):
        load_tokenizer(str(tmp_path))


def test_one_that_lacks_its_settings(llama: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "</s>"
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer_config\.json, which says with which tokens texts begin"):
        load_tokenizer(str(tmp_path))
