"""`llava-npu train`: one stage of training from a configuration file."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a recipe in configs/; see docs/configuration.md.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as in optimizer.learning_rate=2e-5 data.workers=4")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, npu, cuda, cpu, or as npu:1; overrides the file.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the whole resolved run and leave.")
    ] = False,
    debug_size: Annotated[
        bool, typer.Option("--debug-size", help="Try the run in seconds: on tiny models and data, made on the spot.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what this run left in its folder; start over.")
    ] = False,
) -> None:
    """Train a stage: align (projector) or finetune (projector and language model). The same command continues a run."""
    from llava_npu.config import load_config, render_config
    from llava_npu.config.recipes import find_recipe

    run = load_config(
        find_recipe(config), [*(overrides or []), *([f"device={device}"] if device else [])], debug_size=debug_size
    )
    if print_config:
        typer.echo(render_config(run), nl=False)
        return
    if debug_size:
        from llava_npu.debug_size.assets import prepare

        prepare(run)
    from llava_npu.training import train as run_training

    model = run_training(run, fresh=fresh)
    typer.echo(f"The model is in {model}")
