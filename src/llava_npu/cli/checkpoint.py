"""`llava-npu checkpoint`: what a run has saved, whether it is whole, and a model of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at a run's checkpoints, verify them, and make a model of one.", no_args_is_help=True)

_FOLDER = typer.Argument(help="A run folder, or one checkpoint in it: checkpoint-000500, checkpoints/latest or /best.")


@app.callback()
def checkpoint() -> None:
    """Look at a run's checkpoints, verify them, and make a model of one."""


@app.command("inspect")
def inspect_command(
    folder: Annotated[Path, _FOLDER],
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show what checkpoints hold: step, engine and processes that wrote them, weights, size. Nothing is verified."""
    from llava_npu.training.checkpointing import inspecting

    found = [inspecting.describe(each) for each in inspecting.find(folder)]
    typer.echo(inspecting.as_json(found) if json else "\n\n".join(map(inspecting.as_text, found)))


@app.command("verify")
def verify_command(folder: Annotated[Path, _FOLDER]) -> None:
    """Compare every file with the size and checksum in the manifest. Exit status 1 if one is missing or differs."""
    from llava_npu.training.checkpointing import inspecting
    from llava_npu.training.checkpointing.checkpoints import verify

    damaged = False
    for each in inspecting.find(folder):
        problem = verify(each.path)
        damaged = damaged or problem is not None
        typer.echo(f"{each.path}: {problem or 'complete'}")
    if damaged:
        raise typer.Exit(1)


@app.command("export")
def export_command(
    folder: Annotated[Path, _FOLDER],
    output: Annotated[Path, typer.Argument(help="A new folder for the model.")],
) -> None:
    """Write the model of a checkpoint in Hugging Face layout (of a run folder: of its newest), adapters in peft's."""
    from llava_npu.training.checkpointing import inspecting
    from llava_npu.training.checkpointing.export import export_checkpoint

    newest = inspecting.find(folder)[0]
    export_checkpoint(newest.path, output)
    typer.echo(f"The model after step {newest.step} is in {output}")
