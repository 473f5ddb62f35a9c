"""Where a record's images lie, and that they lie nowhere else.

A data file comes from somewhere and is not trusted to name any file of this machine: names are relative, without "..",
and a symbolic link must not lead out of the folder either. Whoever links data sets together from several disks, or
keeps absolute paths, says so with `allow_absolute_paths`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from llava_npu.data.tools.defects import RecordError, require_encodable

# Of any system, whichever runs: a data file is written on one machine and read on another.
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")
_SEPARATORS = re.compile(r"[/\\]")


class ImagePath(Protocol):
    """A `Path`, or something that reads like one: an image in an archive or in a table. Hashable; `str` names it."""

    def read_bytes(self) -> bytes:
        """Raises OSError if it is missing or damaged."""
        ...

    def is_file(self) -> bool: ...

    def __hash__(self) -> int: ...


class ImageRoot(Protocol):
    """A folder or an archive of images."""

    @property
    def allow_absolute_paths(self) -> bool: ...

    def locate(self, image: str, where: str) -> ImagePath:
        """The image of that name, which need not exist; `where` opens the message of a refusal."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """A folder of images; with `allow_absolute_paths`, names and links may lead out of it."""

    path: Path
    allow_absolute_paths: bool = False

    def __str__(self) -> str:
        return str(self.path)

    def locate(self, image: str, where: str) -> Path:
        path = self.path / image
        if not self.allow_absolute_paths:
            real = os.path.realpath(path)
            if not os.path.join(real, "").startswith(_real_prefix(self.path.absolute())):  # noqa: PTH118
                raise RecordError(
                    f"{where}: 'image' is {image!r}, which a link leads out of the image folder {self.path} to {real}; "
                    "copy it there, or allow this with data.allow_absolute_paths if the links are yours",
                    "image path refused",
                )
        return path


def exists(image: ImagePath) -> bool:
    """Whether there is a file to read; a name that the file system cannot hold is none."""
    try:
        return image.is_file()
    except OSError:
        return False


def check_image_name(image: str, where: str, *, allow_absolute_paths: bool) -> None:
    """Refuses names that could lead out of the image folder, whatever the file system holds."""
    require_encodable(image, f"{where}: 'image'")
    if not allow_absolute_paths and _ABSOLUTE.match(image):
        raise RecordError(
            f"{where}: 'image' is the absolute path {image!r}; write it relative to the image folder (image_root), or "
            "set data.allow_absolute_paths",
            "image path refused",
        )
    if "\0" in image or ".." in _SEPARATORS.split(image):
        raise RecordError(
            f"{where}: 'image' is {image!r}, which leaves the image folder; keep images inside it",
            "image path refused",
        )


@lru_cache(maxsize=256)
def _real_prefix(folder: Path) -> str:
    return os.path.join(os.path.realpath(folder), "")  # noqa: PTH118 (with a separator at its end)
