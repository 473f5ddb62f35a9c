"""Deltas add up to the text decoded at once, for any tokens; stop texts are never shown, not even half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from llava_npu.inference.detokenize import AnswerText, finished_text, surrounding_space
from llava_npu.inference.request import Sampling
from llava_npu.inference.sampling import TokenChooser
from support import tiny

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


def test_penalties_count_the_answer_only() -> None:
    """As OpenAI defines them: a token's score falls by presence, and by frequency for each time that it was written."""
    chooser = TokenChooser(Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt_length=2)
    scores = torch.tensor([1.0, 0.9, 0.2, 0.0])
    assert chooser.choose(scores, [0, 0]) == 0  # the prompt does not count
    assert chooser.choose(scores, [0, 0, 0]) == 1
    assert chooser.choose(scores, [0, 0, 0, 1]) == 0  # 0.25 against 0.15
    assert chooser.choose(scores, [0, 0, 0, 0, 1]) == 2  # 0.0, 0.15 and 0.2


def test_no_end_token_before_the_least_length() -> None:
    chooser = TokenChooser(Sampling(min_tokens=2), prompt_length=1, end_tokens={3, 1})
    scores = torch.tensor([0.0, 0.5, 0.1, 1.0])
    assert [chooser.choose(scores, [9] * length) for length in (1, 2, 3)] == [2, 2, 3]
    assert not chooser.takes_the_likeliest


def test_min_p_leaves_the_likely_ones() -> None:
    scores = torch.tensor([3.0, 2.9, 0.0, -1.0])
    drawn = {TokenChooser(Sampling(temperature=2.0, min_p=0.5, seed=seed)).choose(scores, [0]) for seed in range(40)}
    assert drawn == {0, 1}


def test_stop_texts_within_the_least_length_do_not_count() -> None:
    def written(text: str, **options: Any) -> str:
        answer = AnswerText(BYTES, ["ab"], **options)
        shown = ""
        for token in BYTES(text).input_ids:
            shown += answer.add(token)
            if answer.stopped:
                return shown
        return shown + answer.finish()

    assert written("xabyabz") == "x"
    assert written("xabyabz", min_tokens=3) == "xaby"
    assert written("xabyabz", min_tokens=7) == "xabyabz"


@pytest.mark.parametrize(("markup", "text", "shown"), [
    (None, "  a  ", "a"), (("", ""), "  a  ", "  a  "), ((" ", ""), "  a  ", " a  "), ((" ", ""), "a", "a"),
    (("", " "), "a  ", "a "), (("", " "), "a b", "a b"), (("", ""), "a\n", "a\n"),
])  # fmt: skip
def test_only_the_templates_space_is_removed(markup: tuple[str, str] | None, text: str, shown: str) -> None:
    answer = AnswerText(BYTES, ["zz"], markup=markup)
    assert "".join([*map(answer.add, BYTES(text).input_ids), answer.finish()]) == shown


@pytest.mark.parametrize(("template", "space"), [("v1", (" ", "")), ("llama_2", (" ", " ")), ("chatml", ("", ""))])
def test_which_space_is_the_templates(template: str, space: tuple[str, str]) -> None:
    assert surrounding_space(BYTES, template) == space
    if SENTENCEPIECE is not None:  # its decoder drops the first one
        assert surrounding_space(SENTENCEPIECE, template) == ("", space[1])
