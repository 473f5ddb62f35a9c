"""What happens behind the page: a conversation that every model on it answers, all about the same images."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from llava_npu.data.images import load_image
from llava_npu.errors import UserError
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.prompts import Turns, prepare_prompt, with_images_first
from llava_npu.inference.request import Delta, Request, Sampling
from llava_npu.models.processing import IMAGE_TOKEN
from llava_npu.serving.background import BackgroundEngine

_MAX_IMAGES = 8  # of one conversation
_MAX_PIXELS = 25_000_000  # of one image


@dataclass(frozen=True)
class ServedModel:
    """A model that answers, with the name that is shown for it."""

    name: str
    engine: InferenceEngine
    background: BackgroundEngine


@dataclass(frozen=True)
class UploadedImage:
    """A visitor's image, and the file that it came from."""

    file: str
    image: Image.Image


@dataclass(frozen=True)
class Exchange:
    """A question, its images, and each model's answer as far as it has come; None from a model that failed."""

    question: str
    images: tuple[UploadedImage, ...]
    answers: tuple[str | None, ...]


@dataclass(frozen=True)
class ChatHistory:
    """A visitor's conversation: questions and answers, oldest first."""

    exchanges: tuple[Exchange, ...] = ()

    @property
    def num_images(self) -> int:
        return sum(len(exchange.images) for exchange in self.exchanges)

    def prompt(self, place: int, question: str, images: Sequence[UploadedImage]) -> tuple[Turns, list[Image.Image]]:
        """What the model in this place is asked: its own answers so far and the question, and all images in order."""
        turns = []
        waiting = 0  # images of questions left out: a template has no place for an answer without words
        for exchange in self.exchanges:
            answer = exchange.answers[place]
            if answer and answer.strip():
                turns.append(_question(exchange.question, len(exchange.images), waiting))
                turns.append({"from": "gpt", "value": answer})
                waiting = 0
            else:
                waiting += len(exchange.images)
        turns.append(_question(question, len(images), waiting))
        shown = [*(image for exchange in self.exchanges for image in exchange.images), *images]
        return turns, [each.image for each in shown]


def _question(text: str, num_images: int, waiting: int) -> dict[str, str]:
    return {"from": "human", "value": f"{IMAGE_TOKEN}\n" * waiting + with_images_first(text, num_images)}


def open_images(files: Sequence[str], history: ChatHistory) -> tuple[UploadedImage, ...]:
    """The images of the next question.

    Raises:
        UserError: too many, or one that is not an image or too large.
    """
    if history.num_images + len(files) > _MAX_IMAGES:
        raise UserError(f"A conversation here has room for {_MAX_IMAGES} images. Clear it to start another.")
    return tuple(
        UploadedImage(file, load_image(Path(file), f"image {number}", max_pixels=_MAX_PIXELS))
        for number, file in enumerate(files, 1)
    )


async def stream_answers(
    models: Sequence[ServedModel],
    history: ChatHistory,
    question: str,
    images: Sequence[UploadedImage],
    sampling: Sampling,
) -> AsyncGenerator[ChatHistory]:
    """All models answer at the same time; yields the conversation as it grows. Closing the iterator stops them.

    `<image>` in the question says where each image stands; without any, they all come first.

    Raises:
        UserError: the question has no words, `<image>` and images differ in number, or a prompt has become too long.
    """
    if not question.replace(IMAGE_TOKEN, "").strip():
        raise UserError("Write a question first.")
    requests = await asyncio.to_thread(_requests, models, history, question, images, sampling)
    news: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
    answers: list[str | None] = [""] * len(models)

    def with_answers() -> ChatHistory:
        return replace(history, exchanges=(*history.exchanges, Exchange(question, tuple(images), tuple(answers))))

    try:
        for place, (model, request) in enumerate(zip(models, requests, strict=True)):
            model.background.submit(request, _sender(news, place))
        yield with_answers()
        running = len(models)
        while running:
            place, delta = await news.get()
            running -= delta.finish_reason is not None
            if delta.error is not None:
                answers[place] = None
                raise UserError(f"{models[place].name} failed: {delta.error}")
            if delta.text:
                answers[place] = (answers[place] or "") + delta.text
                yield with_answers()
    finally:
        for request in requests:
            request.cancel()


def _requests(
    models: Sequence[ServedModel],
    history: ChatHistory,
    question: str,
    images: Sequence[UploadedImage],
    sampling: Sampling,
) -> list[Request]:
    requests = []
    for place, model in enumerate(models):
        prompt = prepare_prompt(model.engine.processor, *history.prompt(place, question, images), name="conversation")
        room = model.engine.max_length - len(prompt.input_ids)
        limited = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, room)))
        model.engine.check(prompt, limited)
        requests.append(Request(prompt, limited))
    return requests


def _sender(news: asyncio.Queue[tuple[int, Delta]], place: int) -> Callable[[Delta], None]:
    """What an engine's thread calls with each delta; it reaches `news` in this event loop."""
    loop = asyncio.get_running_loop()

    def send(delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is there any more
            loop.call_soon_threadsafe(news.put_nowait, (place, delta))

    return send


def without_last(history: ChatHistory) -> tuple[ChatHistory, Exchange]:
    """The conversation before its last question, and that question.

    Raises:
        UserError: nothing has been asked.
    """
    if not history.exchanges:
        raise UserError("Nothing has been asked yet.")
    return replace(history, exchanges=history.exchanges[:-1]), history.exchanges[-1]


def flag_conversation(models: Sequence[ServedModel], history: ChatHistory, sampling: Sampling, folder: Path) -> Path:
    """Keeps a conversation in a local file, one JSON value a line, its images next to it; nothing about the visitor.

    Returns:
        The file.

    Raises:
        UserError: the conversation is empty, or the file cannot be written.
    """
    if not history.exchanges:
        raise UserError("There is nothing to flag yet.")
    path = folder / "flagged.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "models": [model.name for model in models],
            "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p},
            "exchanges": [
                {
                    "question": each.question,
                    "images": [_keep(each_image.image, folder) for each_image in each.images],
                    "answers": list(each.answers),
                }
                for each in history.exchanges
            ],
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _keep(image: Image.Image, folder: Path) -> str:
    name = f"{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        image.save(folder / name)
    return name
