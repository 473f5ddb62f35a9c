"""`llava-npu download`: fetches a model from a hub, for this machine or for one without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_npu.cli.options import HUB


def download(
    model: Annotated[
        str, typer.Argument(help="organisation/name or modelscope://organisation/name; @REVISION behind it pins one.")
    ],
    source: Annotated[str, HUB] = "huggingface",
    to: Annotated[
        Path | None, typer.Option(help="Copy it to this new folder, to be named as a model or carried elsewhere.")
    ] = None,
    tokenizer_only: Annotated[
        bool, typer.Option("--tokenizer-only", help="The small files alone, without weights.")
    ] = False,
) -> None:
    """Fetch a model from the Hugging Face hub or ModelScope, or what has changed of it there."""
    from llava_npu.hub.hubs import copy_model, download_model

    folder = download_model(model, source, weights=not tokenizer_only)
    typer.echo(copy_model(folder, to) if to is not None else folder)
