"""`llava-npu chat`: one question about pictures, answered as it is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def chat(
    model: Annotated[str, typer.Option(help="A model folder, a run folder or a hub id.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture; give it again for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest word.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, npu, cuda, cpu, or as npu:1.")] = "auto",
) -> None:
    """Ask a model about pictures in the terminal."""
    import torch

    from llava_npu import devices
    from llava_npu.data.images import load_image
    from llava_npu.models import load
    from llava_npu.serving.terminal import stream_answer

    pictures = [load_image(path, "--image") for path in image or []]
    chosen = devices.select(device)
    loaded, processor = load(model, chosen.torch_device, chosen.autocast_dtype or torch.float32)
    for text in stream_answer(
        loaded, processor, prompt, pictures, max_new_tokens=max_new_tokens, temperature=temperature
    ):
        typer.echo(text, nl=False)
    typer.echo()
