"""The turns of a conversation, in LLaVA's terms: human and gpt in alternation, `<image>` where an image belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_npu.data.tools.defects import RecordError, require_encodable, shown
from llava_npu.errors import nearest

IMAGE_MARK = "<image>"
ROLES = ("human", "gpt")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: `role` is 'human' or 'gpt', `text` its words with an `<image>` where each image belongs.

    `supervised` is False for an answer that the data file excludes from the loss.
    """

    role: str
    text: str
    supervised: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a rendered conversation. `starts_answer` marks the place where generation takes over from the prompt."""

    text: str
    supervised: bool = False
    starts_answer: bool = False


def join_parts(parts: Sequence[str | None]) -> str:
    """The text of a message that comes in parts, the same in training, server and chat template (`jinja_template`).

    Images that stand together come first, wherever they were, each on a line of its own; images with text between them
    keep their places. Neighbouring texts become lines of their own. Texts that contain `<image>` say themselves where
    the images stand; the caller compares the numbers. Empty texts do not count.

    Args:
        parts: texts, and None where an image is.
    """
    parts = [part for part in parts if part != ""]
    texts = [part for part in parts if part is not None]
    places = [place for place, part in enumerate(parts) if part is None]
    if any(IMAGE_MARK in text for text in texts):
        return "\n".join(texts)
    if places and places[-1] - places[0] == len(places) - 1:
        return "\n".join([*[IMAGE_MARK] * len(places), *texts])
    joined, after_text = "", False
    for part in parts:
        joined += IMAGE_MARK if part is None else f"\n{part}" if after_text else part
        after_text = part is not None
    return joined


def parse_turns(conversations: Sequence[Turn | Mapping[str, Any]], name: str) -> tuple[Turn, ...]:
    """Turns LLaVA's list of {"from", "value"} into checked `Turn`s; `name` opens each error message.

    Checked: known roles, text values, strict alternation, no `<image>` in an answer, no empty question.

    Raises:
        RecordError: naming the turn, what it holds and the fix.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str | bytes):
        raise RecordError(
            f"{name}: 'conversations' is {shown(conversations)}, not a list; "
            'write a list of {"from": "human" | "gpt", "value": "…"}'
        )
    if not conversations:
        raise RecordError(
            f"{name}: 'conversations' is empty; it needs a human turn and a gpt turn", "empty or unanswerable"
        )
    turns = tuple(_parse_turn(turn, f"{name}: conversations[{i}]") for i, turn in enumerate(conversations))
    for i in range(1, len(turns)):
        if turns[i].role == turns[i - 1].role:
            raise RecordError(
                f"{name}: conversations[{i}].from is {turns[i].role!r}, as in the turn before it; human and gpt take "
                "turns: join the two texts or add the missing turn between them"
            )
    return turns


def _parse_turn(turn: Turn | Mapping[str, Any], where: str) -> Turn:
    if isinstance(turn, Turn):
        role: Any = turn.role
        text: Any = turn.text
        supervised = turn.supervised
    elif isinstance(turn, dict | Mapping):  # dict first: asking an abstract class is ten times slower
        for key in ("from", "value"):
            if key not in turn:
                raise RecordError(f"{where} has no {key!r}; a turn is {{'from': 'human' | 'gpt', 'value': '…'}}")
        role, text, supervised = turn["from"], turn["value"], bool(turn.get("supervised", True))
    else:
        raise RecordError(f"{where} is {shown(turn)}; a turn is {{'from': 'human' | 'gpt', 'value': '…'}}")

    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise RecordError(f"{where}.from is {shown(role)}; allowed are 'human' and 'gpt'.{hint}")
    if not isinstance(text, str):
        raise RecordError(f"{where}.value is {shown(text)}; it must be text")
    require_encodable(text, f"{where}.value")
    if role == "gpt" and IMAGE_MARK in text:
        raise RecordError(
            f"{where}.value: an answer contains '{IMAGE_MARK}' ({shown(text)}); images belong to human turns: "
            "move it there, or reword the answer",
            "image count",
        )
    if role == "human" and not text.strip():
        raise RecordError(
            f"{where}.value: a human turn is empty; give it a question or an '{IMAGE_MARK}'", "empty or unanswerable"
        )
    return Turn(role, text, supervised)
