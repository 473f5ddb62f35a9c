"""`llava-npu plan`: the memory and time that a run needs, before it runs."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    config: Annotated[str, typer.Argument(help="A YAML file or the name of a recipe, as for `llava-npu train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as micro_batch_size=4.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="A product such as ascend-910b2 or h200, or a device of this machine; default: the run's."),
    ] = None,
    num_devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="Devices per node; default: one, or all of this machine.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Fraction of the devices' peak that is assumed to be reached.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, memory in bytes.")] = False,
) -> None:
    """Memory per device by part and engine, the largest micro-batch, FLOPs, time, and a recommendation.

    Only configurations are read: neither weights nor a device are needed. Exit status 3 if the run does not fit.
    """
    import json

    from llava_npu.config import load_config
    from llava_npu.config.recipes import find_recipe
    from llava_npu.planning.plan import plan_run
    from llava_npu.planning.report import print_plan
    from llava_npu.planning.target import find_target
    from llava_npu.training.resolve import ResolvedRun

    path = find_recipe(config)
    run = ResolvedRun(load_config(path, overrides or []), recipes=path.parent)
    target = find_target(device, num_devices, nodes, run.config.precision, run.config.device)
    made = plan_run(run, target, mfu)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False))
    else:
        print_plan(made)
    if not made.fits:
        raise typer.Exit(3)
