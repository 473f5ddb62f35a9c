"""A conversation template as a transformers chat template (Jinja): `pipeline` and servers build the same prompts.

Messages have the roles "user" and "assistant", and as content a string or a list of {"type": "image"} and {"type":
"text", "text": …}.

Training tokenizes the text before, between and behind images piece by piece (`labels.py`), and some tokenizers, Llama's
for one, put a space before each piece. Whoever uses the chat template tokenizes its text whole; so the template writes
those spaces itself, and the ids are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llava_npu.data.conversation.special_tokens import opening_token, special_texts, swallows_first_space
from llava_npu.data.conversation.templates import BOS, EOS, TOKENIZER, VALUE, Template, get_template
from llava_npu.data.conversation.turns import IMAGE_MARK, Segment

# Content → text, as `turns.join_parts` and `templates._settle_images` make it.
_FLATTEN = """
{%- macro flatten(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- set images = content | selectattr('type', 'equalto', 'image') | list | length -%}
    {%- set at = namespace(first=-1, last=-1) -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}
        {%- set at.last = loop.index0 -%}
        {%- if at.first < 0 -%}{%- set at.first = loop.index0 -%}{%- endif -%}
      {%- endif -%}
    {%- endfor -%}
    {%- if images and at.last - at.first == images - 1 -%}
      {%- set words -%}
        {%- for part in content if part.type == 'text' %}{{ '' if loop.first else '\\n' }}{{ part.text }}{% endfor %}
      {%- endset -%}
      {{ ((MARK + '\\n') * images + (words | trim if images == 1 else words)) | trim }}
    {%- else -%}
      {%- for part in content -%}
        {{ '\\n' if part.type == 'text' and loop.previtem is defined and loop.previtem.type == 'text' else '' }}
        {{- MARK if part.type == 'image' else part.text -}}
      {%- endfor -%}
    {%- endif -%}
  {%- endif -%}
{%- endmacro -%}
""".replace("MARK", json.dumps(IMAGE_MARK))


def chat_template(name: str, tokenizer: Any) -> str:
    """The Jinja text of the template called `name` for this tokenizer."""
    template = get_template(name)
    if template is TOKENIZER:
        return _FLATTEN + _in_pieces(_around(tokenizer.chat_template), "", tokenizer, before_spaces=False)
    opening = opening_token(tokenizer, image_first=template.captions)
    return _FLATTEN + _in_pieces(
        _from_data(template, tokenizer, opening), opening, tokenizer, before_spaces=swallows_first_space(tokenizer)
    )


def _around(inner: str) -> str:
    """The tokenizer's own chat template, which takes texts, behind one that takes images too."""
    return (
        "{%- set flat = namespace(messages=[]) -%}"
        + "{%- for message in messages -%}"
        + "{%- set flat.messages = flat.messages + [{'role': message.role, 'content': flatten(message.content)}] -%}"
        + "{%- endfor -%}{%- set messages = flat.messages -%}"
        + inner.removesuffix("\n")  # as Jinja does at the end of a template
    )


def _from_data(template: Template, tokenizer: Any, bos: str) -> str:
    separator = template.separator.replace(BOS, bos)

    def write(segments: Sequence[Segment], value: str) -> str:
        texts = (segment.text.replace(EOS, tokenizer.eos_token or "") for segment in segments)
        return "".join(f"{{{{ {value} }}}}" if text == VALUE else _literal(text) for text in texts)

    return (
        _literal(template.opening)
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


def _in_pieces(inner: str, opening: str, tokenizer: Any, *, before_spaces: bool) -> str:
    """The text that `inner` writes, behind the token `opening`, with the spaces that its pieces have in training.

    `before_spaces`: training gives one to a piece that starts with a space itself, though the tokenizer would not.
    """
    if not _puts_a_space_before("a", tokenizer):
        return _literal(opening) + inner
    keeps_one_space = not before_spaces and not _puts_a_space_before(" a", tokenizer)
    spaceless = sorted(special_texts(tokenizer) | ({" "} if keeps_one_space else set()))
    mark, starts = json.dumps(IMAGE_MARK), ", ".join(json.dumps(text) for text in spaceless)
    behind_token = "true" if opening else "not loop.first"
    return (
        "{%- set whole -%}"
        + inner
        + "{% endset -%}"
        + _literal(opening)
        + f"{{%- for piece in whole.split({mark}) -%}}"
        + f"{{{{ '' if loop.first else {mark} }}}}"
        + f"{{{{ ' ' if piece and {behind_token} and not piece.startswith(({starts},)) else '' }}}}{{{{ piece }}}}"
        + "{%- endfor -%}"
    )


def _puts_a_space_before(text: str, tokenizer: Any) -> bool:
    """Whether this text alone is tokenized as it would be behind a special token and a space."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    wanted = [tokenizer.convert_tokens_to_ids(IMAGE_MARK), *ids(text)]
    return ids(IMAGE_MARK + text) != wanted and ids(f"{IMAGE_MARK} {text}") == wanted


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
