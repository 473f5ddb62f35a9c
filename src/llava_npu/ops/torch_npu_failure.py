"""Why torch_npu cannot be imported, for where `devices/` cannot be asked: it imports torch, which imports torch_npu."""

from __future__ import annotations

import traceback
from pathlib import Path

_MODULE = "torch_npu"


def failure_in(error: BaseException | None) -> BaseException | None:
    """What was raised while torch_npu was imported, if that is what ended in `error`."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            code = frame.f_code
            if code.co_name == "<module>" and _MODULE in Path(code.co_filename).parts:
                return error
        error = error.__cause__ or error.__context__
    return None


def describe_failure(error: BaseException) -> str:
    """The failure and what to do about it, in one sentence."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"torch_npu is installed but cannot be imported ({reason}); source CANN's set_env.sh and check that the "
        "torch_npu, torch and CANN versions belong together."
    )
