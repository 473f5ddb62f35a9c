"""Folders whose chat template is not ours: as transformers renders it, where it keeps words and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

from llava_npu import LlavaNpuConfig, LlavaNpuProcessor, UserError
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.models.composing import add_special_tokens
from llava_npu.models.loaded import load_processor
from support import tiny

PICTURE = Image.new("RGB", (28, 28), (200, 30, 30))
# As LLaVA's on the hub: contents are lists of parts, images come first, answers have no end token.
IN_PARTS = """
{%- for turn in messages -%}
{%- if turn.role == "user" -%}USER: {% else %}ASSISTANT: {% endif -%}
{%- for part in turn.content if part.type == "image" -%}{{ "<image>\\n" }}{%- endfor -%}
{%- for part in turn.content if part.type == "text" -%}{{ part.text }} {% endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""
QUESTION = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [{"type": "text", "text": "Name three rivers."}]}],
    [{"role": "user", "content": QUESTION}],
    [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ],
]


def _folder(folder: Path, chat_template: str | None) -> LlavaNpuConfig:
    words = tiny.tokenizer()
    words.chat_template = None
    image_token = add_special_tokens(words)
    config = LlavaNpuConfig(
        vision_config=tiny.clip_config(), text_config=tiny.text_config(len(words)), image_token_index=image_token
    )
    config.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return config


@pytest.mark.parametrize("older", [False, True], ids=["chat_template.jinja", "chat_template.json"])
def test_a_template_that_takes_parts_gets_them(older: bool, tmp_path: Path) -> None:
    config = _folder(tmp_path / "hub", IN_PARTS)
    if older:
        (tmp_path / "hub/chat_template.jinja").unlink()
        (tmp_path / "hub/chat_template.json").write_text(json.dumps({"chat_template": IN_PARTS}))
    theirs = AutoProcessor.from_pretrained(tmp_path / "hub")
    ours = load_processor(str(tmp_path / "hub"), config)
    assert ours.template == "tokenizer"
    ours.save_pretrained(tmp_path / "ours")
    config.save_pretrained(tmp_path / "ours")
    again = load_processor(str(tmp_path / "ours"), config)
    for messages in CONVERSATIONS:
        images = [PICTURE] * json.dumps(messages).count('"image"')
        text = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert "rivers" in text or "<image>" in text
        ids = theirs(text=text, images=images or None)["input_ids"][0]
        turns = [
            {
                "from": "human" if message["role"] == "user" else "gpt",
                "value": "\n".join(
                    "<image>" if part["type"] == "image" else part["text"] for part in message["content"]
                ),
            }
            for message in messages
        ]
        for processor in (ours, again):
            assert prepare_prompt(processor, turns, images).input_ids == ids
            assert processor.apply_chat_template(messages, add_generation_prompt=True) == text
    assert again.chat_template == ours.chat_template  # not wrapped once more


@pytest.mark.parametrize(
    "broken",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for",
        "{{ nobody.knows }}",
        "{{ 1 / 0 }}",
        "{{ 'x' * 10**12 }}",
    ],
)
def test_a_template_that_loses_words_is_left_aside(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _folder(tmp_path, broken)
    processor = load_processor(str(tmp_path), config)
    assert isinstance(processor, LlavaNpuProcessor)
    assert processor.template == "v1"
    assert "template 'v1' is used instead" in capsys.readouterr().err


FIRST_TEXT = IN_PARTS.replace(
    "{{ part.text }} {% endfor -%}", "{% if loop.first %}{{ part.text }} {% endif %}{% endfor -%}"
)


@pytest.mark.parametrize(
    ("template", "question"),
    [(FIRST_TEXT, "Is <image> or <image> red?"), ("{% for m in messages %}{{ m.content[:40] }}{% endfor %}", "a" * 50)],
)
def test_a_template_that_loses_words_of_some_questions_refuses_these(
    template: str, question: str, tmp_path: Path
) -> None:
    processor = load_processor(str(tmp_path), _folder(tmp_path, template))
    assert processor.template == "tokenizer"
    with pytest.raises(UserError, match="drops or changes words"):
        prepare_prompt(processor, [{"from": "human", "value": question}], [PICTURE] * question.count("<image>"))


@pytest.mark.parametrize("place", ["processor_config.json", "chat_template.json"])
def test_the_processors_template_comes_before_the_tokenizers(place: str, tmp_path: Path) -> None:
    config = _folder(tmp_path, None)
    for name, template in ((place, IN_PARTS), ("tokenizer_config.json", "{{ messages[0].content }}")):
        values = json.loads((tmp_path / name).read_text()) if (tmp_path / name).is_file() else {}
        (tmp_path / name).write_text(json.dumps({**values, "chat_template": template}))
    messages = CONVERSATIONS[0]
    theirs = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    assert load_processor(str(tmp_path), config).apply_chat_template(messages, add_generation_prompt=True) == theirs
