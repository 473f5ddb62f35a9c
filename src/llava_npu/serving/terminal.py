"""One answer, piece by piece as it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Thread
from typing import Any

from PIL import Image
from transformers import TextIteratorStreamer

from llava_npu.errors import UserError
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import IMAGE_TOKEN, LlavaNpuProcessor
from llava_npu.models.stopping import stopping_arguments


def stream_answer(
    model: LlavaNpuForConditionalGeneration,
    processor: LlavaNpuProcessor,
    prompt: str,
    images: Sequence[Image.Image],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yields the answer's text as it is generated, with the prompt of training.

    `<image>` in the prompt says where each picture stands; without any, they all come first.

    Raises:
        UserError: `<image>` and pictures differ in number; an error while generating is raised here too.
    """
    if IMAGE_TOKEN not in prompt:
        prompt = f"{IMAGE_TOKEN}\n" * len(images) + prompt
    if prompt.count(IMAGE_TOKEN) != len(images):
        raise UserError(
            f"the prompt has {prompt.count(IMAGE_TOKEN)} {IMAGE_TOKEN}, but {len(images)} images are given; "
            f"put one {IMAGE_TOKEN} for each, or none at all to have them first."
        )
    inputs = processor.encode_prompts([[{"from": "human", "value": prompt}]], [images]).to(model.device)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    stopping = stopping_arguments(model, processor.tokenizer, processor.template)
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate(**inputs, **sampling, **stopping, max_new_tokens=max_new_tokens, streamer=streamer)
        except BaseException as error:  # noqa: BLE001  it is raised again in the caller's thread
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]
