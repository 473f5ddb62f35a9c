"""Messages in parts: one text, wherever they come from."""

from __future__ import annotations

import itertools

import jinja2
import pytest

from llava_npu.data.conversation.jinja_template import _FLATTEN
from llava_npu.data.conversation.templates import _settle_images
from llava_npu.data.conversation.turns import Turn, join_parts


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_chat_template_joins_parts_as_training_does(length: int) -> None:
    flatten = jinja2.Environment().from_string(_FLATTEN + "{{ flatten(content) }}")
    for parts in itertools.product([None, "Is it", "newer?\nWhy?"], repeat=length):
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        assert flatten.render(content=content) == _settle_images(Turn("human", join_parts(parts))).text
