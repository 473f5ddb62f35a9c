"""`--devices N`: a command that runs in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import typer

from llava_npu.distributed.interruption import EXIT_STATUS


def launch_and_exit(arguments: Sequence[str], devices: int, advice: str = "") -> NoReturn:
    """Runs `llava-npu ARGUMENTS` in `devices` processes, shows what went wrong once, and exits as they did.

    Args:
        advice: ends the message of a failure.
    """
    from llava_npu.distributed.launching import launch
    from llava_npu.files.untrusted import printable

    outcome = launch(arguments, devices)
    if outcome.message:
        stopped = outcome.status in (0, EXIT_STATUS)
        shown = outcome.message if stopped or not advice else f"{outcome.message}\n{advice}"
        typer.secho(printable(shown), fg="yellow" if stopped else "red", err=True)
    raise typer.Exit(outcome.status)
