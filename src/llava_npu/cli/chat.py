"""`llava-npu chat`: questions about images, answered as the words come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.cli.options import BITS, DEVICE, DTYPE, HUB, IMAGE_TOKENS, MAX_LENGTH, MODEL, TEMPLATE

if TYPE_CHECKING:
    from llava_npu.serving.terminal import Conversation


def chat(
    model: Annotated[str, MODEL],
    prompt: Annotated[str | None, typer.Option(help="One question; without it, a conversation starts.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image; give it again for several.")] = None,
    system: Annotated[str | None, typer.Option(help="Another system prompt than the model was trained with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest word.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest words that hold this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many likeliest tokens; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already used become less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    template: Annotated[str | None, TEMPLATE] = None,
    image_tokens: Annotated[int | None, IMAGE_TOKENS] = None,
    source: Annotated[str, HUB] = "huggingface",
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    bits: Annotated[int, BITS] = 16,
    max_length: Annotated[int | None, MAX_LENGTH] = None,
) -> None:
    """Ask a model about images in the terminal."""
    from llava_npu.cli.options import load_model
    from llava_npu.data.images import load_image
    from llava_npu.hub.hubs import on_hub
    from llava_npu.inference.engine import InferenceEngine
    from llava_npu.inference.request import Sampling
    from llava_npu.serving.terminal import Conversation

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    pil_images = [load_image(path, "--image") for path in image or []]
    loaded, _ = load_model(on_hub(model, source), device, dtype, bits, template)
    loaded = loaded.with_image_tokens(image_tokens)
    engine = InferenceEngine(loaded, max_batch=1, max_length=max_length)
    conversation = Conversation(engine, sampling, system)
    for each in pil_images:
        conversation.attach(each)
    if prompt is not None:
        for text in conversation.ask(prompt):
            _write(text)
        typer.echo()
    else:
        _converse(conversation, model, [str(path) for path in image or []])


def _converse(conversation: Conversation, model: str, images: list[str]) -> None:
    """Reads a terminal, or lines from a pipe, which get answers and nothing around them."""
    from llava_npu.serving.terminal import chat_loop

    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  arrow keys and earlier lines at the prompt

        typer.secho(f"{model}. Ask away; /help lists commands, /quit leaves.", dim=True)
        for image in images:
            _show_image(image)

    def read() -> str:
        while True:
            try:
                return input("> " if interactive else "")
            except KeyboardInterrupt:  # the line is thrown away
                if not interactive:
                    raise
                typer.echo()

    chat_loop(conversation, read, _write, _show_image if interactive else lambda path: None)


def _write(text: str) -> None:
    """To a terminal; or through a pipe, just as it is."""
    from llava_npu.files.untrusted import printable

    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)


def _show_image(path: str) -> None:
    typer.secho(f"[{path}]", dim=True)
