"""`~` in paths, also for users who have no home folder."""

from __future__ import annotations

from pathlib import Path

from llava_npu.errors import UserError


def expand_home(path: str | Path) -> Path:
    """The path with a leading `~` replaced by the user's home folder.

    Raises:
        UserError: it has one, and neither HOME nor the system's list of users says where that is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: this user has no home folder (HOME is not set, and the system has no entry for the user). Set "
            "HOME, or give a whole path; for the cache, set LLAVA_NPU_CACHE."
        ) from error
