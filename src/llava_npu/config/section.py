"""What all sections of a configuration have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llava_npu.files.home import expand_home


class Section(BaseModel):
    """Strict: "3" is not a number, 1 is not a boolean, and no number is infinite. Frozen: a run's description does not
    change while it runs.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


def _expanded(path: str) -> str:
    if not path.startswith("~"):
        return path
    try:
        return str(expand_home(path))
    except RuntimeError:
        raise ValueError("the home folder that `~` means is not known; write the path in full") from None


PathText = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]
"""A file, a folder, or (for models) a hub id; `~` is the user's home folder."""
