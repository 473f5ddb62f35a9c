"""A conversation template as a transformers chat template (Jinja): `pipeline` and servers build the same prompts.

Messages have the roles "system", "user" and "assistant", and as content a string or a list of {"type": "image"} and
{"type": "text", "text": …}. They are read by the rule of docs/serving.md ("Messages"), as `serving/api/messages.py`
reads them, and refused where it refuses them.

Training tokenizes the text before, between and behind images piece by piece (`labels.py`), and some tokenizers, Llama's
for one, put a space before each piece. Whoever uses the chat template tokenizes its text whole; so the template writes
those spaces itself, and the ids are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llava_npu.data.conversation.chat_template import takes_parts
from llava_npu.data.conversation.special_tokens import opening_token, special_texts, swallows_first_space
from llava_npu.data.conversation.templates import BOS, EOS, TOKENIZER, VALUE, Template, get_template
from llava_npu.data.conversation.turns import IMAGE_MARK, Segment
from llava_npu.errors import UserError

_MARK = json.dumps(IMAGE_MARK)
# `messages` → `asked.turns`, alternating texts that start with a question, and `asked.system`. The text of each message
# is `turns.join_parts`', the place of a question's image `templates._settle_images`'. vLLM looks for the loop over
# `message.content` to learn that content may come in parts.
_READ_MESSAGES = r"""
{%- set asked = namespace(system=[], turns=[], settled=[]) -%}
{%- for message in messages -%}
  {%- set said = namespace(text='', texts=[], apart='', images=0, first=-1, last=-1, after_text=false) -%}
  {%- if message.content is string -%}
    {%- set said.text = message.content -%}
  {%- elif message.content -%}
    {%- for part in message.content -%}
      {%- if part.type == 'text' and part.text -%}
        {%- set said.apart = said.apart + ('\n' if said.after_text else '') + part.text -%}
        {%- set said.texts = said.texts + [part.text] -%}
        {%- set said.after_text = true -%}
      {%- elif part.type in ('image', 'image_url') -%}
        {%- set said.last = said.images + said.texts | length -%}
        {%- set said.first = said.last if said.first < 0 else said.first -%}
        {%- set said.apart = said.apart + MARK -%}
        {%- set said.images = said.images + 1 -%}
        {%- set said.after_text = false -%}
      {%- elif part.type != 'text' -%}
        {{- raise_exception('a part of type ' ~ part.type ~ '; parts are of type text or image') -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set said.text = said.texts | join('\n') -%}
    {%- if MARK in said.text -%}
      {%- if said.images and said.text.split(MARK) | length != said.images + 1 -%}
        {{- raise_exception('the text does not have one ' ~ MARK ~ ' for each of the ' ~ said.images ~ ' images') -}}
      {%- endif -%}
    {%- elif said.images and said.last - said.first == said.images - 1 -%}
      {%- set said.text = ([MARK] * said.images + said.texts) | join('\n') -%}
    {%- else -%}
      {%- set said.text = said.apart -%}
    {%- endif -%}
  {%- endif -%}
  {%- if message.tool_calls or message.function_call or message.reasoning_content -%}
    {{- raise_exception('tool calls and reasoning_content are not read; write them into the content') -}}
  {%- endif -%}
  {%- if message.role != 'user' and MARK in said.text -%}
    {{- raise_exception('an image in a message of role ' ~ message.role ~ '; images belong to users') -}}
  {%- endif -%}
  {%- if message.role in ('system', 'developer') -%}
    {%- set asked.system = asked.system + ([said.text] if said.text.strip() else []) -%}
  {%- elif message.role not in ('user', 'assistant') -%}
    {{- raise_exception('a message of role ' ~ message.role ~ '; roles are system, user and assistant') -}}
  {%- elif message.role == 'assistant' and not said.text.strip() -%}
    {{- raise_exception('an answer without words; leave it and its question out') -}}
  {%- elif asked.turns and asked.turns[-1].role == message.role -%}
    {%- set joined = asked.turns[-1].content + '\n' + said.text -%}
    {%- set asked.turns = asked.turns[:-1] + [{'role': message.role, 'content': joined}] -%}
  {%- else -%}
    {%- set asked.turns = asked.turns + [{'role': message.role, 'content': said.text}] -%}
  {%- endif -%}
{%- endfor -%}
{%- set asked.system = asked.system | join('\n') -%}
{%- if not asked.turns or asked.turns[0].role != 'user' -%}
  {{- raise_exception('the first message after the system prompt must be of role user') -}}
{%- elif add_generation_prompt and asked.turns[-1].role != 'user' -%}
  {{- raise_exception('the last message must be of role user; there is no question to answer') -}}
{%- endif -%}
{%- for turn in asked.turns -%}
  {%- set text = turn.content -%}
  {%- if not text.strip() -%}
    {{- raise_exception('a message of role user is empty') -}}
  {%- elif turn.role == 'user' and text.split(MARK) | length == 2 -%}
    {%- set text = (MARK + '\n' + text.replace(MARK, '').strip()).strip() -%}
  {%- endif -%}
  {%- set asked.settled = asked.settled + [{'role': turn.role, 'content': text}] -%}
{%- endfor -%}
""".replace("MARK", _MARK)
# As `templates._caption_turns` refuses them.
_ONE_CAPTION = r"""
{%- if asked.turns | length > (1 if add_generation_prompt else 2) -%}
  {{- raise_exception('this model writes captions: one question, and nothing before it') -}}
{%- elif MARK not in asked.turns[0].content -%}
  {{- raise_exception('this model writes captions of images; there is no image') -}}
{%- endif -%}
""".replace("MARK", _MARK)
# Texts with `<image>` → parts, for templates that take nothing else; as `chat_template.as_parts`.
_IN_PARTS = r"""
{%- set taken = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
  {%- set taken.parts = [] -%}
  {%- for piece in message.content.split(MARK) -%}
    {%- if not loop.first -%}
      {%- set taken.parts = taken.parts + [{'type': 'image'}] -%}
      {%- set piece = piece[1:] if piece.startswith('\n') else piece -%}
    {%- endif -%}
    {%- set taken.parts = taken.parts + ([{'type': 'text', 'text': piece}] if piece else []) -%}
  {%- endfor -%}
  {%- set taken.messages = taken.messages + [{'role': message.role, 'content': taken.parts}] -%}
{%- endfor -%}
{%- set messages = taken.messages -%}
""".replace("MARK", _MARK)


def chat_template(name: str, tokenizer: Any) -> str:
    """The Jinja text of the template called `name` for this tokenizer."""
    template = get_template(name)
    if template is TOKENIZER:
        if not tokenizer.chat_template:
            raise UserError(
                "template 'tokenizer' needs a tokenizer that has a chat template; use a named template such as 'v1'."
            )
        inner = tokenizer.get_chat_template().removesuffix("\n")  # as Jinja does at the end of a template
        if inner.startswith(
            _READ_MESSAGES[: _READ_MESSAGES.index("(")]
        ):  # it was saved by llava-npu, maybe an older one
            return inner
        return _READ_MESSAGES + _in_pieces(_around(inner, tokenizer), "", tokenizer, before_spaces=False)
    opening = opening_token(tokenizer, image_first=template.captions)
    return _READ_MESSAGES + _in_pieces(
        _from_data(template, tokenizer, opening), opening, tokenizer, before_spaces=swallows_first_space(tokenizer)
    )


def _around(inner: str, tokenizer: Any) -> str:
    """The tokenizer's own chat template, given the messages as they were read."""
    return (
        "{%- set messages = ([{'role': 'system', 'content': asked.system}] if asked.system else []) + asked.settled -%}"
        + (_IN_PARTS if takes_parts(tokenizer) else "")
        + "{%- set rendered %}"
        + inner
        + "{% endset -%}"
        + "{%- if asked.system and asked.system.strip() not in rendered -%}"
        + "{{ raise_exception('this model has no place for a system prompt') }}"
        + "{%- endif -%}{{ rendered }}"
    )


def _from_data(template: Template, tokenizer: Any, bos: str) -> str:
    def write(segments: Sequence[Segment], value: str) -> str:
        texts = (segment.text.replace(EOS, tokenizer.eos_token or "") for segment in segments)
        return "".join(f"{{{{ {value} }}}}" if text == VALUE else _literal(text) for text in texts)

    question, opening = "turn.content", _literal(template.opening)
    if template.captions:
        question = f"{_MARK} * (turn.content.split({_MARK}) | length - 1)"
    if template.system:
        before, _, behind = template.opening.partition(template.system)
        system = f"{{{{ asked.system or {json.dumps(template.system, ensure_ascii=False)} }}}}"
        opening = _literal(before) + system + _literal(behind)
    elif template.system_turn:
        before, _, behind = template.system_turn.partition(VALUE)
        opening = (
            f"{{%- if asked.system -%}}{_literal(before)}{{{{ asked.system }}}}{_literal(behind)}{{%- endif -%}}"
            + _literal(template.opening)
        )
    else:
        opening = (
            "{%- if asked.system -%}{{ raise_exception('this model has no place for a system prompt') }}{%- endif -%}"
            + opening
        )
    return (
        (_ONE_CAPTION if template.captions else "")
        + opening
        + "{%- for turn in asked.settled -%}{%- if turn.role == 'user' -%}{%- if not loop.first -%}"
        + _literal(template.separator.replace(BOS, bos))
        + "{%- endif -%}"
        + write(template.human, question)
        + "{%- else -%}"
        + write((*template.header, *template.answer), "turn.content")
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
    # One test each: llama.cpp's reader of templates does not know a tuple of prefixes.
    starts = "".join(f" and not piece.startswith({json.dumps(text)})" for text in spaceless)
    behind_token = "true" if opening else "not loop.first"
    return (
        "{%- set whole -%}"
        + inner
        + "{% endset -%}"
        + _literal(opening)
        + f"{{%- for piece in whole.split({_MARK}) -%}}"
        + f"{{{{ '' if loop.first else {_MARK} }}}}"
        + f"{{{{ ' ' if piece and {behind_token}{starts} else '' }}}}{{{{ piece }}}}"
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
