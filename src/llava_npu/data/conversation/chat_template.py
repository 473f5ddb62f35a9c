"""The language model's own chat template, split into segments with the answers marked.

The template is a program (Jinja), not data, so nothing says which of its output is an answer. It is asked instead: the
prompt before each answer is rendered on its own and must be a prefix of the whole conversation; what follows it, up to
and including the first special token behind the answer's words, is what the model has to produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_npu.data.conversation.special_tokens import special_texts
from llava_npu.data.conversation.turns import IMAGE_MARK, Segment, Turn
from llava_npu.data.tools.defects import RecordError
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_ROLES = {"human": "user", "gpt": "assistant"}
_OTHERWISE = "use a named template such as 'chatml' or 'v1'"


def render_chat_template(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    prompt: bool = False,
    system: str | None = None,
) -> list[Segment]:
    """Renders alternating turns; arguments and errors as in `templates.render`.

    Raises:
        UserError: the tokenizer has no chat template, or one that refuses these turns, rewrites earlier turns when
            later ones follow, or ends an answer without a special token.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{name}: template 'tokenizer' needs a tokenizer that has a chat template; {_OTHERWISE}")
    whole = _apply(turns, tokenizer, name, prompt=prompt, system=system)
    if system and system.strip() not in whole:
        raise UserError(f"{name}: the tokenizer's chat template has no place for a system prompt; leave it out")
    if whole.count(IMAGE_MARK) != sum(turn.text.count(IMAGE_MARK) for turn in turns):
        raise UserError(f"{name}: the tokenizer's chat template drops or repeats '{IMAGE_MARK}'; {_OTHERWISE}")

    segments = []
    end = 0
    for i, turn in enumerate(turns):
        if turn.role != "gpt":
            continue
        where = f"{name}: conversations[{i}]"
        if not turn.text.strip():
            raise RecordError(
                f"{where}.value: the answer is empty; write the answer or remove this round", "empty or unanswerable"
            )
        start = _answer_start(turns[:i], whole, tokenizer, where, system)
        segments.append(Segment(whole[end:start]))
        end = _answer_end(turn.text.strip(), whole, start, tokenizer, where)
        segments.append(Segment(whole[start:end], supervised=turn.supervised, starts_answer=True))
    return [*segments, Segment(whole[end:])]


def _answer_start(
    history: Sequence[Turn], whole: str, tokenizer: PreTrainedTokenizerBase, where: str, system: str | None
) -> int:
    """Where generation starts: the length of the prompt that inference would build from the turns so far."""
    before = _apply(history, tokenizer, where, prompt=True, system=system)
    if not whole.startswith(before):
        raise UserError(
            f"{where}: the tokenizer's chat template renders the turns before this answer differently once the answer "
            f"follows, so training and inference would not match; {_OTHERWISE}"
        )
    return len(before)


def _answer_end(words: str, whole: str, start: int, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """Behind the special token that ends the answer."""
    found = whole.find(words, start)
    if found < 0:
        raise UserError(f"{where}: the tokenizer's chat template changes the answer's text; {_OTHERWISE}")
    behind = found + len(words)
    ends = [(at, at + len(text)) for text in special_texts(tokenizer) if (at := whole.find(text, behind)) >= 0]
    if not ends:
        raise UserError(
            f"{where}: the tokenizer's chat template ends an answer without a special token, so the model could not "
            f"learn to stop; {_OTHERWISE}"
        )
    at = min(ends)[0]
    # Tokens may begin alike ("<|end|>", "<|end|>\n"): the tokenizer takes the longest.
    end = max(stop for first, stop in ends if first == at)
    if whole[behind:at].strip():
        raise UserError(
            f"{where}: the tokenizer's chat template puts {whole[behind:at]!r} between an answer and its end token, "
            f"so it is unclear what the model should say; {_OTHERWISE}"
        )
    return end


def _apply(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, name: str, *, prompt: bool, system: str | None
) -> str:
    from jinja2 import TemplateError

    messages = [{"role": _CHAT_ROLES[turn.role], "content": turn.text} for turn in turns]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise UserError(f"{name}: the tokenizer's chat template refuses these turns: {error}; {_OTHERWISE}") from error
    return str(rendered)
