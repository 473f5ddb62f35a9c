"""`llava-npu verify`: are this device's numbers right?"""

from __future__ import annotations

from typing import Annotated

import typer


def verify(
    device: Annotated[str, typer.Option(help="auto, npu, cuda, cpu, or as npu:1.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Operations at real sizes in 16 bits alone: under a minute.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Every comparison as JSON, for programs.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A report for a bug report.")] = False,
) -> None:
    """Compare this device with the CPU: operations at toy and real sizes, the optimizer, and small models in training.

    Exit status 1 if anything differs by more than rounding explains.
    """
    from llava_npu.errors import UserError

    if json and markdown:
        raise UserError("--json and --markdown: choose one of them, or neither.")
    from llava_npu import devices
    from llava_npu.diagnostics import verification_report as report
    from llava_npu.diagnostics.verify import verify as run

    result = run(devices.select(device), progress=lambda line: typer.echo(line, err=True), quick=quick)
    if json:
        typer.echo(report.as_json(result))
    elif markdown:
        typer.echo(report.as_markdown(result))
    else:
        report.show(result)
    if not result.passed:
        raise typer.Exit(1)
