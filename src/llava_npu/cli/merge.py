"""`llava-npu merge`: a model with adapters as a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    model: Annotated[str, typer.Argument(help="A folder with adapters: a finished run, or its model folder.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the plain model.")],
) -> None:
    """Add a model's adapters to the weights of the base that it names, and write a checkpoint that needs no other."""
    from llava_npu.models.loading import merge as write_merged

    write_merged(model, output)
    typer.echo(f"The model is in {output}")
