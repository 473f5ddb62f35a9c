"""`llava-npu data`: looking at training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at training data.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at training data."""


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="LLaVA-format records: a JSON list, or JSONL.")],
    tokenizer: Annotated[str, typer.Option(help="Folder (or hub id) of a tokenizer or a model that has one.")],
    template: Annotated[str, typer.Option(help="Conversation template.")] = "v1",
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; by default the data file's own.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many records to show.")] = 5,
) -> None:
    """Show samples as the model will see them, supervised tokens marked. Exit status 1 if a shown record is faulty."""
    from transformers import AutoTokenizer

    from llava_npu.data.inspect import inspect_records
    from llava_npu.errors import UserError

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--tokenizer {tokenizer}: no tokenizer could be loaded from there: {reason}") from error
    if inspect_records(file, loaded, template, image_root, limit):
        raise typer.Exit(1)
