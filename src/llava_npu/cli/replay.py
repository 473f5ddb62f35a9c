"""`llava-npu replay`: a step that was not finite, computed once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    run: Annotated[Path, typer.Argument(help="A run folder whose run stopped over gradients that are not finite.")],
    device: Annotated[str, typer.Option(help="auto, npu, cuda, cpu, or as npu:1.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default the run's own.")] = None,
) -> None:
    """Compute the batch that a stopped run saved, and say in which module numbers stop being finite.

    Exit status: 0 all numbers are finite here; 1 they are not.
    """
    from llava_npu import devices
    from llava_npu.errors import UserError
    from llava_npu.training.nonfinite.replay import replay as run_replay

    if precision not in (None, "auto", "fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision!r} is unknown. Allowed: auto, fp32, bf16, fp16.")
    if not run_replay(run, devices.select(device), precision, typer.echo):  # type: ignore[arg-type]
        raise typer.Exit(1)
