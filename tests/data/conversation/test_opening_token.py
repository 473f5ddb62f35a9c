"""No sequence starts with an image: something stands in front for the model to park attention on."""

from __future__ import annotations

import pytest

from llava_npu.data.conversation.labels import IGNORE_INDEX, IMAGE_PLACEHOLDER, encode_conversation, encode_prompt
from support import tiny

CAPTION = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]


@pytest.mark.parametrize(("bos_token", "expected"), [(None, "<|im_end|>"), ("<|im_start|>", "<|im_start|>")])
def test_a_caption_gets_a_token_in_front_where_the_tokenizer_adds_none(bos_token: str | None, expected: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = bos_token
    encoded = encode_conversation(CAPTION, tokenizer, "plain")
    assert encoded.input_ids[:2] == [tokenizer.convert_tokens_to_ids(expected), IMAGE_PLACEHOLDER]
    assert encoded.labels[:2] == [IGNORE_INDEX, IGNORE_INDEX]
    assert encode_prompt(CAPTION[:1], tokenizer, "plain") == encoded.input_ids[:2]
    text = tokenizer.decode([token for token in encoded.labels if token != IGNORE_INDEX])
    assert text == "a cat\n"


def test_conversations_already_start_with_text() -> None:
    tokenizer = tiny.tokenizer()
    assert tokenizer.decode(encode_conversation(CAPTION, tokenizer, "v1").input_ids[:9]).startswith("A chat")
