"""Messages in parts: one text, wherever they come from."""

from __future__ import annotations

import itertools

import jinja2
import pytest

from llava_npu.data.conversation.chat_template import as_parts
from llava_npu.data.conversation.jinja_template import _IN_PARTS, _READ_MESSAGES
from llava_npu.data.conversation.templates import _settle_images
from llava_npu.data.conversation.turns import Turn, join_parts


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_chat_template_joins_parts_as_training_does(length: int) -> None:
    environment = jinja2.Environment()
    read = environment.from_string(_READ_MESSAGES + "{{ asked.settled[0].content }}")
    in_parts = environment.from_string(_IN_PARTS + "{{ messages[0].content }}")
    for parts in itertools.product([None, "Is it", "newer?\nWhy?", ""], repeat=length):
        if not any(part is None or part for part in parts):
            continue  # an empty question, which is refused
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        text = _settle_images(Turn("human", join_parts(parts))).text
        assert read.render(messages=[{"role": "user", "content": content}]) == text
        assert in_parts.render(messages=[{"role": "user", "content": text}]) == str(as_parts(text))
