"""Conversations and images to what the engine reads: the prompt of training, whoever asks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image

from llava_npu.data.conversation.turns import join_parts
from llava_npu.errors import UserError
from llava_npu.inference.request import ImageInput, Prompt
from llava_npu.models.processing import IMAGE_TOKEN, LlavaNpuProcessor

Turns = Sequence[Mapping[str, str]]


def prepare_prompt(
    processor: LlavaNpuProcessor,
    turns: Turns,
    images: Sequence[Image.Image],
    *,
    system: str | None = None,
    name: str = "prompt",
) -> Prompt:
    """A conversation that ends with a question, and its images, in the order of their `<image>`.

    Args:
        turns: `{"from": "human"|"gpt", "value": …}`, as in training data.
        system: in place of the template's system prompt.
        name: for error messages.

    Raises:
        UserError: `<image>` and images differ in number, or the template cannot hold these turns.
    """
    inputs = preprocess(processor, images)
    return place_images(processor, processor.encode_prompt(turns, _sizes(inputs), name, system), inputs)


def prepare_rendered_prompt(
    processor: LlavaNpuProcessor, text: str, images: Sequence[Image.Image], *, name: str = "prompt"
) -> Prompt:
    """As `prepare_prompt`, of a text that has the template's markup already."""
    inputs = preprocess(processor, images)
    return place_images(processor, processor.encode_rendered_prompt(text, _sizes(inputs), name), inputs)


def preprocess(processor: LlavaNpuProcessor, images: Sequence[Image.Image]) -> list[ImageInput]:
    """Images as the tower takes them, each known by the hash of its content, not yet placed in a prompt."""
    pixels = [processor.preprocess_images([image]) for image in images]
    return [
        ImageInput(_content_key(of_one, image.size), (image.height, image.width), 0, 0, pixel_values=of_one)
        for of_one, image in zip(pixels, images, strict=True)
    ]


def place_images(processor: LlavaNpuProcessor, input_ids: Sequence[int], images: Sequence[ImageInput]) -> Prompt:
    """A prompt from its token ids and its images, which are told where their tokens stand."""
    ids = list(input_ids)
    placed = []
    start = 0
    for image in images:
        start = ids.index(processor.image_token_id, start)
        placed.append(replace(image, start=start, length=processor.count_image_tokens(image.size)))
        start = placed[-1].end
    return Prompt(ids, tuple(placed))


def with_images_first(question: str, num_images: int) -> str:
    """`<image>` in a question says where each image stands; without any, they all come first.

    Raises:
        UserError: some, but not one for each.
    """
    marks = question.count(IMAGE_TOKEN)
    if marks and marks != num_images:
        raise UserError(
            f"the prompt has {marks} {IMAGE_TOKEN}, but {num_images} images are given; "
            f"put one {IMAGE_TOKEN} for each, or none at all to have them first."
        )
    return join_parts([*[None] * num_images, question])


def _sizes(images: Sequence[ImageInput]) -> list[tuple[int, int]]:
    return [image.size for image in images]


def _content_key(pixels: torch.Tensor, size: tuple[int, int]) -> str:
    content = hashlib.blake2b(repr((size, pixels.shape)).encode(), digest_size=16)
    content.update(pixels.contiguous().numpy().tobytes())
    return content.hexdigest()
