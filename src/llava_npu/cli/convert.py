"""`llava-npu convert`: a checkpoint from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A model folder: Hugging Face's LLaVA, official LLaVA's, or ours."),
    ],
    destination: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    to: Annotated[
        Literal["hf", "official"], typer.Option(help="hf: for transformers and vLLM; official: haotian-liu/LLaVA.")
    ] = "hf",
    base: Annotated[
        str | None, typer.Option(help="Folder of the language model, where SOURCE is a projector or LoRA weights.")
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the vision tower, in place of the one that SOURCE names; with --to official, the "
            "name to write instead of the tower's weights."
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Conversation template that an official model was trained with; by default v1.")
    ] = None,
) -> None:
    """Convert a checkpoint to another layout; its own is told from its content."""
    from llava_npu.models.checkpoints.convert import Help
    from llava_npu.models.checkpoints.convert import convert as run

    layout = run(source, destination, to, Help(base, vision_tower, template))
    typer.echo(f"{source} ({layout}) → {destination} ({to})")
