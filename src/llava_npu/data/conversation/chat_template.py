"""The language model's own chat template, split into segments with the answers marked.

The template is a program (Jinja), not data, so nothing says which of its output is an answer. It is asked instead: the
prompt before each answer is rendered on its own and must be a prefix of the whole conversation; what follows it, up to
and including the first special token behind the answer's words, is what the model has to produce.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.data.conversation.special_tokens import special_texts
from llava_npu.data.conversation.turns import IMAGE_MARK, Segment, Turn
from llava_npu.data.tools.defects import RecordError
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_ROLES = {"human": "user", "gpt": "assistant"}
_OTHERWISE = "use a named template such as 'chatml' or 'v1'"
_PROBE = "What is shown here"
_MOST_SECONDS, _MOST_BYTES = 10, 2**30  # that a template may take for one question
_MOST_SECONDS_WAITING = 60
_NO_ANSWER = 3
_takes_parts: dict[str, bool | None] = {}  # by chat template


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
            later ones follow, or, for training, ends an answer without a special token.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{name}: template 'tokenizer' needs a tokenizer that has a chat template; {_OTHERWISE}")
    whole = _apply(turns, tokenizer, name, prompt=prompt, system=system)
    if system and system.strip() not in whole:
        raise UserError(f"{name}: the tokenizer's chat template has no place for a system prompt; leave it out")
    if whole.count(IMAGE_MARK) != sum(turn.text.count(IMAGE_MARK) for turn in turns):
        raise UserError(f"{name}: the tokenizer's chat template drops or repeats '{IMAGE_MARK}'; {_OTHERWISE}")
    words = _without_space(whole)
    for i, turn in enumerate(turns):
        if turn.role == "human" and not all(_without_space(text) in words for text in turn.text.split(IMAGE_MARK)):
            raise UserError(
                f"{name}: conversations[{i}]: the tokenizer's chat template drops or changes words; {_OTHERWISE}"
            )

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
        end, problem = _answer_end(turn.text.strip(), whole, start, tokenizer)
        if problem and (end < 0 or not prompt):  # a prompt only needs to know where answers start
            raise UserError(f"{where}: the tokenizer's chat template {problem}; {_OTHERWISE}")
        segments.append(Segment(whole[start:end], supervised=turn.supervised, starts_answer=True))
    return [*segments, Segment(whole[end:])]


def _without_space(text: str) -> str:
    return "".join(text.split())


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


def _answer_end(words: str, whole: str, start: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """The place behind the special token that ends the answer, and what is wrong, or "".

    Without such a token it is the place behind the words, and -1 where they are not to be found.
    """
    found = whole.find(words, start)
    if found < 0:
        return -1, "changes the answer's text"
    behind = found + len(words)
    ends = [(at, at + len(text)) for text in special_texts(tokenizer) if (at := whole.find(text, behind)) >= 0]
    if not ends:
        return behind, "ends an answer without a special token, so the model could not learn to stop"
    at = min(ends)[0]
    if whole[behind:at].strip():
        return behind, (
            f"puts {whole[behind:at]!r} between an answer and its end token, so it is unclear what the model should say"
        )
    # Tokens may begin alike ("<|end|>", "<|end|>\n"): the tokenizer takes the longest.
    return max(stop for first, stop in ends if first == at), ""


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Whether the tokenizer's chat template wants contents as lists of parts, as LLaVA's on the hub do.

    It is asked by example: such templates drop the words of a content that is text. None: it loses words or images
    either way.
    """
    template = str(tokenizer.chat_template)
    if template not in _takes_parts:
        text = f"{IMAGE_MARK}\n{_PROBE}"
        contents = [text, as_parts(text)]

        def first_kept() -> int:
            kept = (number for number, content in enumerate(contents) if _keeps_probe(content, tokenizer))
            return next(kept, len(contents))

        _takes_parts[template] = (False, True, None)[_within_bounds(first_kept)]
    return _takes_parts[template]


def _within_bounds(ask: Callable[[], int]) -> int:
    """What `ask` finds out (0 to 2) by running a template, which is another's program: in a process that can be ended.

    Raises:
        UserError: it takes too long, or too much memory.
    """
    if sys.platform != "linux":
        return ask()
    with warnings.catch_warnings():  # of other threads, which the process lacks; it needs none
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if not process:
        answer = _NO_ANSWER
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)  # of processor time, however busy the machine is
            signal.alarm(_MOST_SECONDS_WAITING)  # for a lock that a thread held which the process lacks
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + _MOST_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
            answer = ask()
        finally:
            os._exit(answer)
    answer = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if answer not in range(_NO_ANSWER):
        raise UserError(
            f"the tokenizer's chat template does not render one question within {_MOST_SECONDS} seconds and "
            f"{_MOST_BYTES >> 30} GiB of memory: it may loop for ever. Repair it, or {_OTHERWISE}"
        )
    return answer


def as_parts(text: str) -> list[dict[str, str]]:
    """A text with `<image>` in parts. A line's end behind an image is the template's to write."""
    first, *rest = text.split(IMAGE_MARK)
    parts = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        parts.append({"type": "image"})
        words = piece.removeprefix("\n")
        parts += [{"type": "text", "text": words}] if words else []
    return parts


def _keeps_probe(content: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  a template is a program, and may fail as any does
        return False
    return _PROBE in rendered and str(rendered).count(IMAGE_MARK) == 1


def _apply(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, name: str, *, prompt: bool, system: str | None
) -> str:
    form: Callable[[str], Any] = as_parts if takes_parts(tokenizer) else str
    messages = [{"role": _CHAT_ROLES[turn.role], "content": form(turn.text)} for turn in turns]
    if system is not None:
        messages.insert(0, {"role": "system", "content": form(system)})
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        raise UserError(f"{name}: the tokenizer's chat template refuses these turns: {error}; {_OTHERWISE}") from error
    return str(rendered)
