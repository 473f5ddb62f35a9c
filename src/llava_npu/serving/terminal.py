"""The terminal chat: a conversation about images, answered as the words come."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from PIL import Image

from llava_npu.data.images import load_image
from llava_npu.errors import UserError, nearest
from llava_npu.files.home import expand_home
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.prompts import prepare_prompt, with_images_first
from llava_npu.inference.request import Sampling

HELP = """\
/image FILE…     images for the next question; write <image> in it to say where each stands
/clear           forget the conversation and its images
/system TEXT     another system prompt than the model was trained with; without TEXT, the trained one again
/set NAME VALUE  max_new_tokens, temperature (0: always the likeliest word), top_p, top_k,
                 min_p, repetition_penalty, seed
/again           answer the last question once more
/history         the conversation so far
/help            this list
/quit            leave (also Ctrl-D); Ctrl-C stops an answer"""

_SETTINGS: dict[str, Callable[[str], float]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}


class Conversation:
    """A conversation with one model. What was asked and answered is the prompt of the next question.

    Attributes:
        sampling: how answers are chosen.
        turns: `{"from": "human"|"gpt", "value": …}`, as in training data.
    """

    def __init__(self, engine: InferenceEngine, sampling: Sampling, system: str | None = None):
        """`system`: in place of the template's system prompt."""
        self.sampling = sampling
        self.turns: list[dict[str, str]] = []
        self._engine = engine
        self._system = system
        self._images: list[Image.Image] = []  # of all turns, in order
        self._attached: list[Image.Image] = []  # for the next question

    def attach(self, image: Image.Image) -> None:
        """An image for the next question."""
        self._attached.append(image)

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer as it grows. Closing the iterator stops it; what was said so far stays said.

        Raises:
            UserError: `<image>` and images differ in number, or the conversation has become too long; it is then
                as it was before the question.
        """
        turns = [*self.turns, {"from": "human", "value": with_images_first(question, len(self._attached))}]
        images = [*self._images, *self._attached]
        prompt = prepare_prompt(self._engine.processor, turns, images, system=self._system, name="conversation")
        self._engine.check(prompt, self.sampling)
        answer = ""
        try:
            for delta in self._engine.generate(prompt, self.sampling):
                answer += delta.text
                yield delta.text
        finally:
            # A template has no place for an answer without words: such a question is as if it had not been asked.
            if answer.strip():
                self.turns = [*turns, {"from": "gpt", "value": answer}]
                self._images, self._attached = images, []

    def again(self) -> Iterator[str]:
        """Answers the last question once more. Without a new answer the earlier one stays.

        Raises:
            UserError: there is none, or as `ask`.
        """
        if not self.turns:
            raise UserError("nothing has been asked yet.")
        before = self.turns, self._images
        attached, question = self._attached, self.turns[-2]["value"]
        kept = len(self._images) - question.count("<image>")
        self._attached = self._images[kept:]
        self._images, self.turns = self._images[:kept], self.turns[:-2]
        try:
            yield from self.ask(question)
        finally:
            if len(self.turns) < len(before[0]):
                self.turns, self._images = before
            self._attached = attached

    def clear(self) -> None:
        """Forgets all turns and images."""
        self.turns, self._images, self._attached = [], [], []

    def use_system(self, text: str | None) -> None:
        """Another system prompt, or the template's own again; checked by the next question."""
        self._system = text


def chat_loop(
    conversation: Conversation, read: Callable[[], str], write: Callable[[str], None], show_image: Callable[[str], None]
) -> None:
    """Questions and commands until the input ends; what is wrong with one is said, and the next may come.

    Args:
        read: the next line; raises EOFError at the end.
        write: shows text as it is, without a line's end.
        show_image: told of each image that was attached.
    """
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if not line.startswith("/"):
                _show(conversation.ask(line) if line else iter(()), write)
            elif line == "/again":
                _show(conversation.again(), write)
            else:
                _command(conversation, line, write, show_image)
        except UserError as error:
            write(f"error: {error}\n")


def _show(deltas: Iterator[str], write: Callable[[str], None]) -> None:
    written = False
    try:
        for text in deltas:
            write(text)
            written = written or bool(text)
    except KeyboardInterrupt:
        deltas.close()  # type: ignore[attr-defined]
        write(" [stopped]")
        written = True
    if written:
        write("\n")


def _command(
    conversation: Conversation, line: str, write: Callable[[str], None], show_image: Callable[[str], None]
) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/image":
        for path in _paths(rest):
            conversation.attach(load_image(expand_home(path), "/image"))
            show_image(path)
    elif name == "/clear":
        conversation.clear()
        write("new conversation\n")
    elif name == "/system":
        conversation.use_system(rest or None)
        write("system prompt changed\n" if rest else "the system prompt of training again\n")
    elif name == "/set":
        conversation.sampling = _changed(conversation.sampling, rest)
    elif name == "/history":
        for turn in conversation.turns:
            write(f"{'>' if turn['from'] == 'human' else ' '} {turn['value']}\n")
    elif name == "/help":
        write(f"{HELP}\n")
    else:
        known = ["/image", "/clear", "/system", "/set", "/again", "/history", "/help", "/quit"]
        raise UserError(f"{name} is not a command.{nearest(name, known)} /help lists them.")


def _paths(text: str) -> list[str]:
    try:
        paths = shlex.split(text)
    except ValueError as error:
        raise UserError(f"/image {text}: {error}") from error
    if not paths:
        raise UserError("/image needs a file, as in: /image cat.jpg")
    return paths


def _changed(sampling: Sampling, text: str) -> Sampling:
    name, _, value = text.partition(" ")
    if name not in _SETTINGS:
        raise UserError(f"/set {name}: allowed are {', '.join(_SETTINGS)}.{nearest(name, _SETTINGS)}")
    try:
        changed: dict[str, Any] = {name: _SETTINGS[name](value)}
        return replace(sampling, **changed)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"/set {name} {value}: a number is expected.") from error
