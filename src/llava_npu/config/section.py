"""What all sections of a configuration have in common."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llava_npu.errors import UserError
from llava_npu.files.home import expand_home

_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, of Linux


class Section(BaseModel):
    """Strict: "3" is not a number, 1 is not a boolean, and no number is infinite. Frozen: a run's description does not
    change while it runs.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


def _expanded(path: str) -> str:
    if path.startswith("~"):
        try:
            path = str(expand_home(path))
        except UserError:
            raise ValueError("the home folder that `~` means is not known; write the path in full") from None
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(
            f"is longer than a path can be; allowed are {_LONGEST_PATH} bytes in all, {_LONGEST_NAME} between slashes"
        )
    return path


PathText = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]
"""A file, a folder, or (for models) a hub id; `~` is the user's home folder."""
