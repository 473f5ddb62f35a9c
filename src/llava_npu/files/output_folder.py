"""The folder that a run writes to: new, empty, or that of the same run, which then resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.files.locks import LOCK


def claim_folder(folder: Path, marker: str, setting: str, owner: str) -> bool:
    """Creates the folder, or checks that it is empty or was created by the same command.

    Args:
        folder: where a run is to write.
        marker: the file by which its own folders are recognised.
        setting: what the user set, for messages.
        owner: what creates such folders, as in "`llava-npu train`".

    Returns:
        whether it holds an earlier run.

    Raises:
        UserError: it holds something else, is a file, or cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{setting}: {folder} is a file. Give a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be created or read: {error.strerror}.") from error
    if names and not (folder / marker).is_file():
        shown = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        raise UserError(
            f"{setting}: {folder} is not empty (it holds {shown}) and was not created by {owner} (it has no {marker}). "
            "Give a new or empty folder."
        )
    return bool(names)


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], matters: Callable[[str], bool] = lambda key: True
) -> list[str]:
    """What differs between two descriptions of a run, a line per key."""
    return [
        f"  {key}: {before.get(key)!r} → {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and matters(key)
    ]
