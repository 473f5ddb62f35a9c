"""Whether all processes of a launch are about to do the same."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from accelerate import Accelerator
from accelerate.utils import gather_object

from llava_npu.errors import UserError

_SHOWN = 100  # characters of a value


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
