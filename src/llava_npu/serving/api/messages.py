"""From OpenAI's messages to the turns of training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llava_npu.data.conversation.turns import join_parts
from llava_npu.data.tools.defects import shown
from llava_npu.errors import UserError, nearest
from llava_npu.models.processing import IMAGE_TOKEN

# Further fields of messages and parts that say nothing about the answer (lm-eval sends messages of type "text"); all
# others are refused unless they are empty.
_WITHOUT_EFFECT = frozenset(
    {"name", "type", "id", "uuid", "detail", "annotations", "cache_control", "prompt_cache_breakpoint", "metadata"}
)


class TextPart(BaseModel, extra="allow"):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel, extra="allow"):
    url: str


class ImagePart(BaseModel, extra="allow"):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel, extra="allow"):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


@dataclass(frozen=True)
class ParsedMessages:
    """What a list of messages says.

    Attributes:
        turns: `{"from": "human"|"gpt", "value": …}`, human and gpt in alternation.
        image_urls: of the images, in the order of the turns' `<image>`.
        system: in place of the template's system prompt; None leaves it.
    """

    turns: list[dict[str, str]]
    image_urls: list[str] = field(default_factory=list)
    system: str | None = None


def read_messages(messages: Sequence[Message]) -> ParsedMessages:
    """Reads messages by the rule of docs/serving.md ("Messages"), as the exported chat template does.

    Neighbouring messages of one role become one turn; system messages, wherever they stand, the system prompt. The text
    of each message is `turns.join_parts`'.

    Raises:
        UserError: no question at the end, an empty one, an image outside a question, `<image>` without an image, or a
            field that would be left out.
    """
    turns: list[dict[str, str]] = []
    urls: list[str] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        _refuse_other_fields(message, where)
        text, images = _flatten(message, where)
        if images and message.role != "user":
            raise UserError(f"{where}: an image in a message of role {message.role!r}; images belong to users")
        if message.role in ("system", "developer"):
            system += [text] if text.strip() else []
            continue
        urls += images
        role = "human" if message.role == "user" else "gpt"
        if role == "gpt" and not text.strip():
            raise UserError(f"{where}: an answer without words; leave it and its question out")
        if turns and turns[-1]["from"] == role:
            turns[-1]["value"] += f"\n{text}"
        else:
            turns.append({"from": role, "value": text})
    if not turns or turns[-1]["from"] != "human":
        raise UserError("messages: the last one must be of role 'user'; it has no question to answer")
    if turns[0]["from"] == "gpt":
        raise UserError("messages: the first one after the system prompt must be of role 'user'")
    if not all(turn["value"].strip() for turn in turns):
        raise UserError("messages: a message of role 'user' is empty; give it words or an image")
    return ParsedMessages(turns, urls, "\n".join(system) if system else None)


def _flatten(message: Message, where: str) -> tuple[str, list[str]]:
    """A message's text, with `<image>` where its images stand, and their URLs."""
    if not isinstance(message.content, list):
        return _without_images(message.content or "", where), []
    parts = message.content
    for number, part in enumerate(parts):
        _refuse_other_fields(part, f"{where}.content[{number}]")
    images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    text = join_parts([None if isinstance(part, ImagePart) else part.text for part in parts])
    if not images:
        return _without_images(text, where), []
    if (marks := text.count(IMAGE_TOKEN)) != len(images):
        raise UserError(f"{where}: {marks} {IMAGE_TOKEN} in the text, but {len(images)} images; write one for each")
    return text, images


def _without_images(text: str, where: str) -> str:
    if IMAGE_TOKEN in text:
        raise UserError(f"{where}: the text has {IMAGE_TOKEN}, but the message has no image")
    return text


def _refuse_other_fields(read: BaseModel, where: str) -> None:
    """Tool calls, images under another name, …: what was meant would be missing without a word."""
    for name, value in (read.model_extra or {}).items():
        if name in _WITHOUT_EFFECT or value in (None, "", [], {}, False):
            continue
        hint = nearest(name, type(read).model_fields)
        raise UserError(f"{where}: {name[:60]!r} is {shown(value)}; this server does not read it, leave it out.{hint}")
    if isinstance(read, ImagePart):
        _refuse_other_fields(read.image_url, f"{where}.image_url")
