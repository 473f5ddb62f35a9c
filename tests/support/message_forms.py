"""Forms of OpenAI messages, and the turns of a training record that each is the prompt of (docs/serving.md).

`None` in a content stands for an image.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

Content = str | list[str | None] | None
Turns = list[dict[str, str]]
DOORS = ("training", "chat", "serve", "web", "answer_all", "transformers", "vLLM")
REFUSED, NOT_SAID = "refused", "–"


@dataclass(frozen=True)
class Form:
    """
    Attributes:
        said: (role, content) of each message.
        turns: the record whose training has this prompt; empty if the messages are refused.
        exceptions: for some doors, `REFUSED`, or `NOT_SAID` where it cannot be said; "all" stands for every other one.
    """

    said: list[tuple[str, Content]]
    turns: Turns = field(default_factory=list)
    system: str | None = None
    exceptions: dict[str, str] = field(default_factory=dict)

    def at(self, door: str) -> str:
        """The cell of the table."""
        return self.exceptions.get(door, self.exceptions.get("all", "same ids"))

    @property
    def num_images(self) -> int:
        return sum(list(content or []).count(None) for _, content in self.said if not isinstance(content, str))

    def messages(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """As JSON, with `image` for each image."""

        def json(content: Content) -> Any:
            if not isinstance(content, list):
                return content
            return [image if part is None else {"type": "text", "text": part} for part in content]

        return [{"role": role, "content": json(content)} for role, content in self.said]


def _human(text: str) -> Turns:
    return [{"from": "human", "value": text}]


_ONE_QUESTION = {"chat": NOT_SAID, "web": NOT_SAID, "answer_all": NOT_SAID}
_SYSTEM = {"training": REFUSED, "web": NOT_SAID, "answer_all": NOT_SAID}
_NO_PROMPT = {"training": NOT_SAID, **_ONE_QUESTION, "all": REFUSED}

FORMS = {
    "text": Form([("user", "What is it?")], _human("What is it?")),
    "text, outer spaces": Form([("user", "  What is it? \n")], _human("  What is it? \n")),
    "several texts": Form([("user", ["Look closely.", "What is it?"])], _human("Look closely.\nWhat is it?")),
    "image, text": Form([("user", [None, "What is it?"])], _human("<image>\nWhat is it?")),
    "image, text, outer spaces": Form([("user", [None, "  What is it? \n"])], _human("<image>\nWhat is it?")),
    "text, image": Form([("user", ["What is it?", None])], _human("<image>\nWhat is it?")),
    "image, several texts": Form([("user", [None, "Look.", "What is it?"])], _human("<image>\nLook.\nWhat is it?")),
    "image alone": Form([("user", [None])], _human("<image>"), exceptions={"web": REFUSED}),
    "two images, text": Form([("user", [None, None, "Which?"])], _human("<image>\n<image>\nWhich?")),
    "text, two images": Form([("user", ["Which?", None, None])], _human("<image>\n<image>\nWhich?")),
    "text between images": Form([("user", ["Is ", None, " or ", None, " red?"])], _human("Is <image> or <image> red?")),
    "`<image>` in the text": Form(
        [("user", [None, None, "Is <image> or <image> red?"])], _human("Is <image> or <image> red?")
    ),
    "question, answer, question": Form(
        [("user", [None, "What is it?"]), ("assistant", "A cat."), ("user", "What colour?")],
        [*_human("<image>\nWhat is it?"), {"from": "gpt", "value": "A cat."}, *_human("What colour?")],
        exceptions={"answer_all": NOT_SAID},
    ),
    "two user messages in a row": Form(
        [("user", [None, "Look."]), ("user", "What is it?")],
        _human("<image>\nLook.\nWhat is it?"),
        exceptions={"training": REFUSED, **_ONE_QUESTION},
    ),
    "system, text": Form([("system", "Be brief."), ("user", "What?")], _human("What?"), "Be brief.", _SYSTEM),
    "system, image": Form(
        [("system", "Be brief."), ("user", [None, "What?"])], _human("<image>\nWhat?"), "Be brief.", _SYSTEM
    ),
    "two system messages": Form(
        [("system", "Be brief."), ("user", "What?"), ("developer", ["Be kind."])],
        _human("What?"),
        "Be brief.\nBe kind.",
        {**_SYSTEM, "chat": NOT_SAID},
    ),
    "blank system": Form([("system", " "), ("user", "What?")], _human("What?"), None, _SYSTEM),
    "assistant last": Form([("user", "What?"), ("assistant", "A cat.")], exceptions=_NO_PROMPT),
    "assistant first": Form([("assistant", "Hello."), ("user", "What?")], exceptions=_NO_PROMPT),
    "empty content": Form([("user", "")], exceptions={"all": REFUSED}),
    "empty answer": Form([("user", "What?"), ("assistant", ""), ("user", "So?")], exceptions=_NO_PROMPT),
    "image of the assistant": Form(
        [("user", "What?"), ("assistant", [None, "This."]), ("user", "So?")],
        exceptions={**_NO_PROMPT, "training": REFUSED},
    ),
}  # fmt: skip


def as_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def table() -> str:
    """As in docs/serving.md."""
    lines = [f"| messages | {' | '.join(DOORS)} |", "|---" * (len(DOORS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(form.at(door) for door in DOORS)} |" for name, form in FORMS.items()]
    return "\n".join(lines)
