"""Answers to many questions at once, from Python."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from llava_npu.data.image_roots import ImagePath
from llava_npu.data.images import load_image
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.prompts import prepare_prompt, with_images_first
from llava_npu.inference.request import Request, Sampling
from llava_npu.models.loaded import LoadedModel

ImageLike = Image.Image | ImagePath | str | bytes


def answer_all(
    loaded: LoadedModel,
    questions: Sequence[str],
    images: Sequence[Sequence[ImageLike]] | None = None,
    *,
    sampling: Sampling | None = None,
    max_batch: int = 8,
) -> list[str]:
    """Answers questions, several at a time; a long answer keeps no short one waiting.

    Images are opened and prompts prepared as their turn comes: a long list needs no more memory than a short one.

    Args:
        loaded: the model, as `llava_npu.load` returns it.
        questions: `<image>` says where each image stands; without any, they all come first.
        images: the images of each question: files, their bytes, or PIL images.
        sampling: how answers are chosen; greedy by default.
        max_batch: maximum number of answers decoded together.

    Returns:
        One text for each question, in their order.

    Raises:
        UserError: an image cannot be read, or does not fit the question; a prompt is too long.
    """
    sampling = sampling or Sampling()
    all_images = images if images is not None else [()] * len(questions)
    todo = list(enumerate(zip(questions, all_images, strict=True)))[::-1]
    engine = InferenceEngine(loaded, max_batch=max_batch)
    texts = [""] * len(questions)
    numbers: dict[Request, int] = {}
    while todo or numbers:
        while todo and len(numbers) < 2 * max_batch:
            number, (question, of_one) = todo.pop()
            opened = [_open(image, f"question {number}") for image in of_one]
            turns = [{"from": "human", "value": with_images_first(question, len(opened))}]
            request = Request(prepare_prompt(loaded.processor, turns, opened, name=f"question {number}"), sampling)
            engine.submit(request)
            numbers[request] = number
        for request, delta in engine.step():
            if delta.error is not None:
                raise delta.error
            texts[numbers[request]] += delta.text
            if delta.finish_reason:
                del numbers[request]
    return texts


def _open(image: ImageLike, origin: str) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else load_image(image, origin)
