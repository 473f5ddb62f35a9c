"""A conversation template as a transformers chat template (Jinja): `pipeline` and servers build the same prompts.

Messages have the roles "user" and "assistant", and as content a string or a list of {"type": "image"} and {"type":
"text", "text": …}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llava_npu.data.special_tokens import opening_token
from llava_npu.data.templates import BOS, EOS, TOKENIZER, VALUE, Segment, Template, get_template
from llava_npu.data.turns import IMAGE_MARK

# Content → text, with the image where `templates._settle_images` puts it: one alone comes first, on its own line.
_FLATTEN = """
{%- macro flatten(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- set images = content | selectattr('type', 'equalto', 'image') | list | length -%}
    {%- if images == 1 -%}
      {{ MARK + '\\n' }}{% for part in content if part.type == 'text' %}{{ part.text | trim }}{% endfor %}
    {%- else -%}
      {%- for part in content %}{{ MARK if part.type == 'image' else part.text }}{% endfor -%}
    {%- endif -%}
  {%- endif -%}
{%- endmacro -%}
""".replace("MARK", json.dumps(IMAGE_MARK))


def chat_template(name: str, tokenizer: Any) -> str:
    """The Jinja text of the template called `name` for this tokenizer."""
    template = get_template(name)
    if template is TOKENIZER:
        return _around(tokenizer.chat_template)
    return _from_data(template, tokenizer)


def _around(inner: str) -> str:
    """The tokenizer's own chat template, which takes texts, behind one that takes images too."""
    return (
        _FLATTEN
        + "{%- set flat = namespace(messages=[]) -%}"
        + "{%- for message in messages -%}"
        + "{%- set flat.messages = flat.messages + [{'role': message.role, 'content': flatten(message.content)}] -%}"
        + "{%- endfor -%}{%- set messages = flat.messages -%}"
        + inner
    )


def _from_data(template: Template, tokenizer: Any) -> str:
    bos = opening_token(tokenizer, image_first=template.captions)
    separator = template.separator.replace(BOS, bos)

    def write(segments: Sequence[Segment], value: str) -> str:
        texts = (segment.text.replace(EOS, tokenizer.eos_token or "") for segment in segments)
        return "".join(f"{{{{ {value} }}}}" if text == VALUE else _literal(text) for text in texts)

    return (
        _FLATTEN
        + _literal(bos + template.opening)
        + "{%- for message in messages -%}{%- set text = flatten(message.content) -%}"
        + "{%- if message.role == 'user' -%}"
        + "{%- if not loop.first -%}"
        + _literal(separator)
        + "{%- endif -%}"
        + write(template.human, json.dumps(IMAGE_MARK) if template.captions else "text | trim")
        + "{%- elif message.role == 'assistant' -%}"
        + write((*template.header, *template.answer), "text")
        + "{%- else -%}{{ raise_exception('roles are user and assistant; this model has its own system prompt') }}"
        + "{%- endif -%}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}"
        + write(template.header, "''")
        + "{%- endif -%}"
    )


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
