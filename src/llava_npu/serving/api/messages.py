"""From OpenAI's messages to the turns of training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llava_npu.data.conversation.turns import join_parts
from llava_npu.errors import UserError
from llava_npu.models.processing import IMAGE_TOKEN


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


@dataclass(frozen=True)
class Asked:
    """What a list of messages says.

    Attributes:
        turns: `{"from": "human"|"gpt", "value": …}`, human and gpt in alternation.
        image_urls: of the pictures, in the order of the turns' `<image>`.
        system: in place of the template's system prompt; None leaves it.
    """

    turns: list[dict[str, str]]
    image_urls: list[str] = field(default_factory=list)
    system: str | None = None


def read_messages(messages: Sequence[Message]) -> Asked:
    """Neighbouring messages of one role become one turn; system messages, wherever they stand, the system prompt.

    Pictures come first, each on a line of its own, as in training data, unless text stands between them: then each
    stays where it is. `<image>` written in a text says where, too, if there is one for each picture of the message.

    Raises:
        UserError: no question at the end, a picture outside a question, or `<image>` without a picture.
    """
    turns: list[dict[str, str]] = []
    urls: list[str] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        text, pictures = _flatten(message, where)
        if pictures and message.role != "user":
            raise UserError(f"{where}: a picture in a message of role {message.role!r}; pictures belong to users")
        if message.role in ("system", "developer"):
            system.append(text)
            continue
        urls += pictures
        role = "human" if message.role == "user" else "gpt"
        if role == "gpt" and not text.strip():
            raise UserError(f"{where}: an answer without words; leave it and its question out")
        if turns and turns[-1]["from"] == role:
            turns[-1]["value"] += f"\n{text}"
        else:
            turns.append({"from": role, "value": text})
    if not turns or turns[-1]["from"] != "human":
        raise UserError("messages: the last one must be of role 'user'; there is no question to answer")
    if turns[0]["from"] == "gpt":
        raise UserError("messages: the first one besides the system prompt must be of role 'user'")
    return Asked(turns, urls, "\n".join(system) if system else None)


def _flatten(message: Message, where: str) -> tuple[str, list[str]]:
    """A message's text, with `<image>` where its pictures stand, and their URLs."""
    if not isinstance(message.content, list):
        return _without_pictures(message.content or "", where), []
    parts = message.content
    pictures = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if not pictures:
        return _without_pictures("\n".join(texts), where), []
    marks = sum(text.count(IMAGE_TOKEN) for text in texts)
    if marks:
        if marks != len(pictures):
            raise UserError(f"{where}: {marks} {IMAGE_TOKEN} in the text, but {len(pictures)} pictures; one for each")
        return "\n".join(texts), pictures
    return join_parts([None if isinstance(part, ImagePart) else part.text for part in parts]), pictures


def _without_pictures(text: str, where: str) -> str:
    if IMAGE_TOKEN in text:
        raise UserError(f"{where}: the text has {IMAGE_TOKEN}, but the message has no picture")
    return text
