"""Deltas add up to the text decoded at once, for any tokens; stop texts are never shown, not even half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer

import tiny
from llava_npu.inference.detokenize import AnswerText, finished_text

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "llama_tokenizer.model"
BYTES = tiny.tokenizer()
SENTENCEPIECE = LlamaTokenizer.from_pretrained(str(GOLDEN.parent), vocab_file=str(GOLDEN)) if GOLDEN.is_file() else None
TOKENIZERS = [BYTES, SENTENCEPIECE]


def _streamed(tokenizer: Any, ids: list[int], stops: list[str]) -> list[str]:
    text = AnswerText(tokenizer, stops)
    deltas = []
    for token in ids:
        deltas.append(text.add(token))
        if text.stopped:
            break
    return [*deltas, text.finish()]


def _whole(tokenizer: Any, ids: list[int], stops: list[str]) -> str:
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return finished_text(decoded, stops)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "sentencepiece"])
@settings(max_examples=60)
@given(data=st.data())
def test_deltas_add_up(tokenizer: Any, data: st.DataObject) -> None:
    first = (
        259 if tokenizer is SENTENCEPIECE else 0
    )  # it decodes a run of single bytes all or nothing: see test_ordinary_texts
    ids = data.draw(st.lists(st.integers(first, len(tokenizer) - 1), max_size=30))
    assert "".join(_streamed(tokenizer, ids, [])) == _whole(tokenizer, ids, [])


@settings(max_examples=100)
@given(text=st.text("ab. \n", max_size=20), stops=st.lists(st.text("ab.", max_size=3), max_size=3))
@example(text="ab", stops=["b"])
def test_stop_texts(text: str, stops: list[str]) -> None:
    deltas = _streamed(BYTES, BYTES(text).input_ids, stops)
    assert "".join(deltas) == finished_text(text, stops)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", ["A cat, on a sofa.", "naïve 猫 on 🛋️!", "  spaces   inside  ", "line\n\nline\n"])
def test_ordinary_texts(tokenizer: Any, text: str) -> None:
    deltas = _streamed(tokenizer, tokenizer(text, add_special_tokens=False).input_ids, [])
    assert "".join(deltas) == text.strip()
    assert len([delta for delta in deltas if delta]) > 1
    assert not any("�" in delta for delta in deltas)
