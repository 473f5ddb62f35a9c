"""Answers to many questions at once, from Python."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from llava_npu.data.image_roots import ImagePath
from llava_npu.data.images import load_image
from llava_npu.inference.engine import Engine
from llava_npu.inference.prompts import prepare_prompt, with_images_first
from llava_npu.inference.request import Sampling, Ticket
from llava_npu.models.loaded import LoadedModel

Picture = Image.Image | ImagePath | str | bytes


def answer_all(
    loaded: LoadedModel,
    questions: Sequence[str],
    images: Sequence[Sequence[Picture]] | None = None,
    *,
    sampling: Sampling | None = None,
    max_batch: int = 8,
) -> list[str]:
    """Answers questions, several at a time; a long answer keeps no short one waiting.

    Pictures are opened and prompts prepared as their turn comes: a long list needs no more memory than a short one.

    Args:
        loaded: the model, as `llava_npu.load` returns it.
        questions: `<image>` says where each picture stands; without any, they all come first.
        images: the pictures of each question: files, their bytes, or PIL images.
        sampling: how answers are chosen; greedy by default.
        max_batch: answers at once.

    Returns:
        One text for each question, in their order.

    Raises:
        UserError: a picture cannot be read, or does not fit the question; a prompt is too long.
    """
    sampling = sampling or Sampling()
    pictures = images if images is not None else [()] * len(questions)
    todo = list(enumerate(zip(questions, pictures, strict=True)))[::-1]
    engine = Engine(loaded, max_batch=max_batch)
    texts = [""] * len(questions)
    places: dict[Ticket, int] = {}
    while todo or places:
        while todo and len(places) < 2 * max_batch:
            place, (question, of_one) = todo.pop()
            opened = [_open(picture, f"question {place}") for picture in of_one]
            turns = [{"from": "human", "value": with_images_first(question, len(opened))}]
            ticket = Ticket(prepare_prompt(loaded.processor, turns, opened, name=f"question {place}"), sampling)
            engine.submit(ticket)
            places[ticket] = place
        for ticket, piece in engine.step():
            if piece.error is not None:
                raise piece.error
            texts[places[ticket]] += piece.text
            if piece.finish_reason:
                del places[ticket]
    return texts


def _open(picture: Picture, origin: str) -> Image.Image:
    return picture.convert("RGB") if isinstance(picture, Image.Image) else load_image(picture, origin)
