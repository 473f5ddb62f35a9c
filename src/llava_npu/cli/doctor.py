"""`llava-npu doctor`: is this machine set up?"""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Facts and findings as JSON, for programs.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for torch and the devices to answer.")] = 60,
) -> None:
    """Check versions, drivers, devices, environment and disk, and say how to fix what is wrong.

    Exit status 1 if there are errors.
    """
    from llava_npu.diagnostics import doctor as diagnosis
    from llava_npu.diagnostics.findings import Level

    machine, found = diagnosis.diagnose(timeout)
    if json:
        typer.echo(diagnosis.as_json(machine, found))
    else:
        diagnosis.show(found)
    if diagnosis.count(found, Level.ERROR):
        raise typer.Exit(1)
