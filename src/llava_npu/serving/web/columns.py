"""What happens behind the page: one column of conversation for each model, all about the same pictures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from llava_npu.data.images import load_image
from llava_npu.errors import UserError
from llava_npu.inference.engine import Engine
from llava_npu.inference.prompts import Turns, prepare_prompt, with_images_first
from llava_npu.inference.request import Delta, Request, Sampling
from llava_npu.models.processing import IMAGE_TOKEN
from llava_npu.serving.background import BackgroundEngine

_MAX_PICTURES = 8  # of one conversation
_MAX_PIXELS = 25_000_000  # of one picture


@dataclass(frozen=True)
class Column:
    """A model that answers, with the name that is shown for it."""

    name: str
    engine: Engine
    background: BackgroundEngine


@dataclass(frozen=True)
class Picture:
    """A visitor's picture, and the file that it came from."""

    file: str
    image: Image.Image


@dataclass(frozen=True)
class Exchange:
    """A question, its pictures, and each column's answer as far as it has come; None from a column that failed."""

    question: str
    pictures: tuple[Picture, ...]
    answers: tuple[str | None, ...]


@dataclass(frozen=True)
class Talk:
    """A visitor's conversation: questions and answers, oldest first."""

    exchanges: tuple[Exchange, ...] = ()

    @property
    def num_pictures(self) -> int:
        return sum(len(exchange.pictures) for exchange in self.exchanges)

    def prompt(self, column: int, question: str, pictures: Sequence[Picture]) -> tuple[Turns, list[Image.Image]]:
        """What a column is asked: its own answers so far and the question, and all pictures in their order."""
        turns = []
        waiting = 0  # pictures of questions left out: a template has no place for an answer without words
        for exchange in self.exchanges:
            answer = exchange.answers[column]
            if answer and answer.strip():
                turns.append(_question(exchange.question, len(exchange.pictures), waiting))
                turns.append({"from": "gpt", "value": answer})
                waiting = 0
            else:
                waiting += len(exchange.pictures)
        turns.append(_question(question, len(pictures), waiting))
        shown = [*(picture for exchange in self.exchanges for picture in exchange.pictures), *pictures]
        return turns, [picture.image for picture in shown]


def _question(text: str, num_pictures: int, waiting: int) -> dict[str, str]:
    return {"from": "human", "value": f"{IMAGE_TOKEN}\n" * waiting + with_images_first(text, num_pictures)}


def open_pictures(files: Sequence[str], talk: Talk) -> tuple[Picture, ...]:
    """The pictures of the next question.

    Raises:
        UserError: too many, or one that is not an image or is too large.
    """
    if talk.num_pictures + len(files) > _MAX_PICTURES:
        raise UserError(f"A conversation here has room for {_MAX_PICTURES} pictures. Clear it to start another.")
    return tuple(
        Picture(file, load_image(Path(file), f"picture {number}", max_pixels=_MAX_PIXELS))
        for number, file in enumerate(files, 1)
    )


async def ask(
    columns: Sequence[Column], talk: Talk, question: str, pictures: Sequence[Picture], sampling: Sampling
) -> AsyncGenerator[Talk]:
    """All columns answer at the same time; yields the conversation as it grows. Closing the iterator stops them.

    `<image>` in the question says where each picture stands; without any, they all come first.

    Raises:
        UserError: the question has no words, `<image>` and pictures differ in number, or a prompt has become too long.
    """
    if not question.replace(IMAGE_TOKEN, "").strip():
        raise UserError("Write a question first.")
    requests = await asyncio.to_thread(_requests, columns, talk, question, pictures, sampling)
    news: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
    answers: list[str | None] = [""] * len(columns)

    def with_answers() -> Talk:
        return replace(talk, exchanges=(*talk.exchanges, Exchange(question, tuple(pictures), tuple(answers))))

    try:
        for place, (column, request) in enumerate(zip(columns, requests, strict=True)):
            column.background.submit(request, _teller(news, place))
        yield with_answers()
        running = len(columns)
        while running:
            place, delta = await news.get()
            running -= delta.finish_reason is not None
            if delta.error is not None:
                answers[place] = None
                raise UserError(f"{columns[place].name} failed: {delta.error}")
            if delta.text:
                answers[place] = (answers[place] or "") + delta.text
                yield with_answers()
    finally:
        for request in requests:
            request.cancel()


def _requests(
    columns: Sequence[Column], talk: Talk, question: str, pictures: Sequence[Picture], sampling: Sampling
) -> list[Request]:
    requests = []
    for place, column in enumerate(columns):
        prompt = prepare_prompt(column.engine.processor, *talk.prompt(place, question, pictures), name="conversation")
        room = column.engine.max_length - len(prompt.input_ids)
        limited = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, room)))
        column.engine.check(prompt, limited)
        requests.append(Request(prompt, limited))
    return requests


def _teller(news: asyncio.Queue[tuple[int, Delta]], place: int) -> Callable[[Delta], None]:
    """What an engine's thread calls with each delta; it reaches `news` in this event loop."""
    loop = asyncio.get_running_loop()

    def tell(delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is there any more
            loop.call_soon_threadsafe(news.put_nowait, (place, delta))

    return tell


def without_last(talk: Talk) -> tuple[Talk, Exchange]:
    """The conversation before its last question, and that question.

    Raises:
        UserError: nothing has been asked.
    """
    if not talk.exchanges:
        raise UserError("Nothing has been asked yet.")
    return replace(talk, exchanges=talk.exchanges[:-1]), talk.exchanges[-1]
