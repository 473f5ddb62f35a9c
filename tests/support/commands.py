"""The command line within the process of the tests: to start another one and import everything takes seconds."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from unittest.mock import patch

from llava_npu.cli import main


def run_command(
    *arguments: str, typed: str = "", environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Runs `llava-npu ARGUMENTS`.

    Args:
        typed: what stands on its standard input.
        environment: variables to set meanwhile. Those that libraries read when they are imported change nothing.
    """
    output, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["llava-npu", *arguments]),
        patch.object(sys, "stdin", io.StringIO(typed)),
        patch.dict(os.environ, environment or {}),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            main()
            status: object = 0
        except SystemExit as leave:
            status = leave.code or 0
    return CompletedProcess(arguments, int(str(status)), output.getvalue(), errors.getvalue())
