"""`llava-npu train`: one stage of training from a configuration file."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llava_npu.distributed.interruption import EXIT_STATUS


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe; see docs/configuration.md.")],
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
    devices: Annotated[
        int, typer.Option(min=1, help="How many devices of this machine to train on, a process each.")
    ] = 1,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="Start even what, by its plan, does not fit into memory.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what this run left in its folder; start over.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Continue though configuration or data changed since the start.")
    ] = False,
) -> None:
    """Train a stage: align (projector) or finetune (projector and language model). The same command continues a run.

    Exit status: 0 the model is there; 2 something you can mend; 75 stopped by SIGTERM or Ctrl-C with all saved, so that
    the same command continues.
    """
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
    if devices > 1:
        switches = {"fresh": fresh, "accept_changes": accept_changes, "debug_size": debug_size}
        flags = _flags(device, **switches, ignore_plan=ignore_plan)
        _launch(devices, [config, *(overrides or []), *flags])
        return
    from llava_npu.training import train as run_training

    model = run_training(run, fresh=fresh, accept_changes=accept_changes, ignore_plan=ignore_plan)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"The model is in {model}")


def _flags(device: str | None, **switches: bool) -> list[str]:
    """The options of this command, for the processes that do its work."""
    return [
        *(["--device", device] if device else []),
        *(f"--{name.replace('_', '-')}" for name, on in switches.items() if on),
    ]


def _launch(devices: int, arguments: list[str]) -> None:
    from llava_npu.distributed.launching import launch

    outcome = launch(["train", *arguments], devices)
    if outcome.message:
        typer.secho(outcome.message, fg="red" if outcome.status not in (0, EXIT_STATUS) else "yellow", err=True)
    raise typer.Exit(outcome.status)
