"""Whether all processes of a launch are about to do the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from llava_npu.errors import UserError

_SHOWN = 100  # characters of a value
_LAG_SECONDS = 60.0  # how long a network file system may keep an old listing, by the defaults of NFS


def check_agreement(facts: Mapping[str, str], accelerator: Accelerator) -> None:
    """Ends all processes where one of them has other facts than the main process, which raises `UserError`.

    Processes that continue with different versions, settings or data train different models, or wait for each other
    for ever.

    Args:
        facts: what must be equal, by a name that tells a user what it is.
    """
    every: list[dict[str, str]] = gather_object([dict(facts)])
    ours = every[0]
    for rank, theirs in enumerate(every):
        different = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if different and not accelerator.is_main_process:
            raise SystemExit(2)  # the main process says why
        if different:
            shown = "; ".join(
                f"{name} is {_short(theirs.get(name))}, in process 0 {_short(ours.get(name))}" for name in different[:6]
            )
            raise UserError(
                f"process {rank} differs from process 0: {shown}. All processes need the same code, configuration and "
                "files: on several nodes, the same environment and a shared folder (or equal copies of it)."
            )


def check_shared(file: Path, accelerator: Accelerator) -> None:
    """Ends all processes where one of them does not see the main process's `file`, since the folder is not shared.

    Each machine may have its own file by that name, of an earlier run: size and time of change tell them apart.
    """
    seen = [_seen(file)]
    broadcast_object_list(seen)
    waits_until = time.monotonic() + _LAG_SECONDS
    while _seen(file) != seen[0] and time.monotonic() < waits_until:
        time.sleep(1)
    check_agreement({str(file): _seen(file)}, accelerator)


def _seen(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return "not there"
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns / 1e9:.6f}"


def package_version(name: str) -> str:
    """The version of an installed package, or that it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _short(value: str | None) -> str:
    if value is None:
        return "not there"
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
