"""`llava-npu train`: one stage of training from a configuration file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.cli.options import launch_and_exit

if TYPE_CHECKING:
    from llava_npu.config import RunConfig


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe; see docs/configuration.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as optimizer.learning_rate=2e-5 data.workers=4.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, npu, cuda, cpu, or one device such as npu:1; overrides the file.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole resolved run and exit.")
    ] = False,
    debug_size: Annotated[
        bool, typer.Option("--debug-size", help="Try the run in seconds, on tiny models and data made on the spot.")
    ] = False,
    devices: Annotated[
        int, typer.Option(min=1, help="Number of devices of this machine to train on, one process each.")
    ] = 1,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="Start even if the plan says that the run does not fit into memory.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier run left in its folder and start over.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Continue although configuration or data changed since the start.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="Trace these steps, such as 20-22, and show what their time went to; see docs/watching.md.",
        ),
    ] = None,
) -> None:
    """Train a stage: align (projector) or finetune (projector and language model). The same command resumes a run.

    Exit status: 0 success; 2 user error (configuration, data, environment); 75 interrupted after saving a checkpoint:
    the same command resumes.
    """
    from llava_npu.config import render_config

    run = _read(config, [*(overrides or []), *([f"device={device}"] if device else [])], debug_size)
    if print_config:
        typer.echo(render_config(run), nl=False)
        return
    if profile is not None:
        from llava_npu.training.monitoring.profiling import ProfiledSteps

        ProfiledSteps.parse(profile)
    if debug_size:
        from llava_npu.debug_size.assets import prepare

        prepare(run)
    if devices > 1:
        switches = {"fresh": fresh, "accept_changes": accept_changes, "debug_size": debug_size}
        flags = _flags(device, profile, **switches, ignore_plan=ignore_plan)
        launch_and_exit(["train", config, *(overrides or []), *flags], devices)
        return
    _train(run, fresh=fresh, accept_changes=accept_changes, ignore_plan=ignore_plan, profile=profile)


def _train(run: RunConfig, *, fresh: bool, accept_changes: bool, ignore_plan: bool, profile: str | None) -> None:
    from llava_npu.distributed import launched
    from llava_npu.planning.check import choose_recomputation, refuse_what_cannot_fit
    from llava_npu.training import train as run_training
    from llava_npu.training.resolve import ResolvedRun

    resolved = choose_recomputation(ResolvedRun(run), launched.world_size(), fresh=fresh)
    outcome = refuse_what_cannot_fit(resolved, launched.world_size(), fresh=fresh, only_warn=ignore_plan)
    if outcome is not None and launched.rank() == 0:
        typer.echo(outcome, err=True)
    model = run_training(resolved, fresh=fresh, accept_changes=accept_changes, profile=profile)
    if launched.rank() == 0:
        typer.echo(f"The model is in {model}")


def _read(config: str, overrides: list[str], debug_size: bool) -> RunConfig:
    from llava_npu.config import load_config
    from llava_npu.config.recipes import find_recipe

    if not debug_size:
        return load_config(find_recipe(config), overrides)
    from llava_npu.debug_size.config import load_at_debug_size

    return load_at_debug_size(find_recipe(config), overrides)


def _flags(device: str | None, profile: str | None, **switches: bool) -> list[str]:
    """This command's options, for the processes that do its work."""
    return [
        *(["--device", device] if device else []),
        *(["--profile", profile] if profile else []),
        *(f"--{name.replace('_', '-')}" for name, on in switches.items() if on),
    ]
