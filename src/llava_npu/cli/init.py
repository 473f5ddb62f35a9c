"""`llava-npu init`: a first run configuration for one's own data and model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.errors import UserError

if TYPE_CHECKING:
    from llava_npu.planning.new_run import NewRun


def init(
    file: Annotated[Path, typer.Argument(help="The YAML file to write.")] = Path("run.yaml"),
    data: Annotated[str | None, typer.Option(help="Data file or folder; see docs/data.md for the formats.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, or .tar or .zip; by default the data file's folder.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A LLaVA model to finetune, or TOWER,LANGUAGE_MODEL for a new one; folders or hub ids."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, npu, cuda, cpu, or one device such as npu:1.")] = "auto",
) -> None:
    """Write a run configuration with comments for your data and model, and show its plan.

    Asks in a terminal for what is not given.
    """
    from llava_npu.files.atomic import write_text
    from llava_npu.files.home import expand_home
    from llava_npu.planning.new_run import NewRun, look_at_data

    typer.echo("Looking at the data …", err=True)
    if file.exists():
        raise UserError(f"{file} exists already; name another file, or remove it first.")
    path = expand_home(_given(data, "--data", "Data file or folder"))
    if images is None and data is None:
        images = _optional("Folder of the images (empty: the data file's folder)")
    summary = look_at_data(path, images)
    typer.echo(str(summary), err=True)
    tower, _, language_model = _given(model, "--model", "LLaVA model, or VISION_TOWER,LANGUAGE_MODEL").partition(",")
    if language_model:
        run = NewRun(summary, f"runs/{file.stem}", "align", device, vision_tower=tower, language_model=language_model)
    else:
        run = NewRun(summary, f"runs/{file.stem}", "finetune", device, checkpoint=tower)
    text = _planned(run, file)
    write_text(file, text)
    typer.echo(f"\nWrote {file}. Next:\n  llava-npu train {file}\n  llava-npu chat --model {run.output}/model")


def _given(value: str | None, option: str, question: str) -> str:
    if value is not None:
        return value
    if not sys.stdin.isatty():
        raise UserError(
            f"{option} is missing, and standard input is not a terminal to ask in. {question}: {option} VALUE."
        )
    return str(typer.prompt(question))


def _optional(question: str) -> Path | None:
    answer = str(typer.prompt(question, default="", show_default=False))
    return Path(answer) if answer else None


def _planned(run: NewRun, file: Path) -> str:
    """The configuration with what its plan recommends; the plan is shown."""
    from dataclasses import replace

    from llava_npu.config.loading import load_text
    from llava_npu.planning.plan import plan_run
    from llava_npu.planning.report import print_plan, recommended_settings
    from llava_npu.planning.target import find_target
    from llava_npu.training.resolve import ResolvedRun

    typer.echo("Planning …", err=True)
    config = load_text(run.render(), file)
    target = find_target(None, None, 1, config.precision, config.device)
    plan = plan_run(ResolvedRun(config), target, mfu=0.4)
    settings = tuple(recommended_settings(plan).items())
    text = replace(run, settings=settings).render()
    choice = plan.recommended
    if choice is not None and (choice is not plan.configured or choice.largest != plan.size):
        # Memory, time and padding are of micro-batches as configured. The first plan traced those of the default size,
        # and read what the recommended one takes off a line through them.
        plan = plan_run(ResolvedRun(load_text(text, file)), target, mfu=0.4)
    print_plan(plan)
    return text
