"""Conversations and pictures to what the engine reads: the prompt of training, whoever asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from llava_npu.errors import UserError
from llava_npu.inference.request import Prompt
from llava_npu.models.processing import IMAGE_TOKEN, LlavaNpuProcessor, sizes_of

Turns = Sequence[Mapping[str, str]]


def prepare_prompt(
    processor: LlavaNpuProcessor,
    turns: Turns,
    images: Sequence[Image.Image],
    *,
    system: str | None = None,
    name: str = "prompt",
) -> Prompt:
    """A conversation that ends with a question, and its pictures, in the order of their `<image>`.

    Args:
        turns: `{"from": "human"|"gpt", "value": …}`, as in training data.
        system: in place of the template's system prompt.
        name: for error messages.

    Raises:
        UserError: `<image>` and pictures differ in number, or the template cannot hold these turns.
    """
    return _prompt(processor, processor.encode_prompt(turns, sizes_of(images), name, system), images)


def prepare_rendered_prompt(
    processor: LlavaNpuProcessor, text: str, images: Sequence[Image.Image], *, name: str = "prompt"
) -> Prompt:
    """As `prepare_prompt`, of a text that has the template's markup already."""
    return _prompt(processor, processor.encode_rendered_prompt(text, sizes_of(images), name), images)


def _prompt(processor: LlavaNpuProcessor, input_ids: list[int], images: Sequence[Image.Image]) -> Prompt:
    return Prompt(input_ids, processor.preprocess_images(images) if images else None, tuple(sizes_of(images)))


def with_images_first(question: str, num_images: int) -> str:
    """`<image>` in a question says where each picture stands; without any, they all come first.

    Raises:
        UserError: some, but not one for each.
    """
    marks = question.count(IMAGE_TOKEN)
    if marks and marks != num_images:
        raise UserError(
            f"the prompt has {marks} {IMAGE_TOKEN}, but {num_images} images are given; "
            f"put one {IMAGE_TOKEN} for each, or none at all to have them first."
        )
    return question if marks else f"{IMAGE_TOKEN}\n" * num_images + question
