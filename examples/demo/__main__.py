"""`python examples/demo`: the whole way on real weights and real images, from packages to a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_npu import UserError
from llava_npu.cli import run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `import demo`, from wherever this is started

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: less data, fewer steps, all stages.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All data and many more steps; for a GPU or an NPU.")] = False,
    output: Annotated[Path, typer.Option(help="Run folder; an interrupted demo resumes in it.")] = Path("demo-run"),
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only fetch weights and build the data, for `compare` or your own runs.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, npu, cuda or cpu; with an index as in npu:1.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Random seed (data split, questions, training).")] = 0,
) -> None:
    """Train a small LLaVA on real images, evaluate it before and after each stage, and write a report."""
    if quick and full:
        raise UserError("--quick and --full: choose one of them, or neither.")
    from demo.run import run_demo

    run_demo(
        "quick" if quick else "full" if full else "default", output, device=device, seed=seed, prepare_only=prepare
    )


if __name__ == "__main__":
    run(app)
