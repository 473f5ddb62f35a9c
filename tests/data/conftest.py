"""Tokenizers of three kinds: Llama's, a byte-level BPE with ChatML tokens, and a unigram with prefix spaces."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent.parent / "golden"
CHATML_JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt is a cat, isn't it?\n\n\n  Two  spaces   here.",
    "USER: What is this? ASSISTANT: A cat. 这是什么 猫 😀 user\nassistant\nsystem\n",
] * 4


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(GOLDEN / "llama_tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> PreTrainedTokenizerBase:
    return LlamaTokenizer.from_pretrained(llama_folder, legacy=False)


@pytest.fixture(scope="session")
def llama_legacy(llama_folder: Path) -> PreTrainedTokenizerBase:
    return LlamaTokenizer.from_pretrained(llama_folder, legacy=True)


@pytest.fixture(scope="session")
def bytes_bpe() -> PreTrainedTokenizerBase:
    """As SmolLM2's: byte-level, ChatML special tokens, bos_token set but never added, no unk token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML_JINJA
    return tokenizer


@pytest.fixture(scope="session")
def unigram() -> PreTrainedTokenizerBase:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(32, 127)],
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
