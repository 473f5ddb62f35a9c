"""Where a question's image comes from, opened only when a model is about to see it.

An image is known by its `key`, so that the rotations of a question, and all questions about one image, share one
entry in a feature cache. An image that cannot be decoded raises `UnreadableImageError` when it is opened, not when the
benchmark is read: the runner counts such questions as wrong and reports them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from llava_npu.data.image_roots import ImagePath
from llava_npu.data.images import load_image
from llava_npu.errors import UserError


class UnreadableImageError(UserError):
    """An image that is missing or cannot be decoded."""


class ImageSource(Protocol):
    """An image that is opened on demand."""

    @property
    def key(self) -> str:
        """Equal for equal images."""

    def open(self) -> Image.Image:
        """The decoded image in RGB. Raises `UnreadableImageError`."""


@dataclass(frozen=True)
class EmbeddedImage:
    """An encoded image (PNG, JPEG, …) held in memory, as MMBench-form files carry them."""

    key: str
    data: bytes = field(repr=False, compare=False)
    origin: str

    def open(self) -> Image.Image:
        return _decode(self.data, self.origin)


@dataclass(frozen=True)
class ImageFile:
    """An image in a file, or in an archive of them."""

    path: ImagePath
    origin: str = field(compare=False)

    @property
    def key(self) -> str:
        return str(self.path)

    def open(self) -> Image.Image:
        return _decode(self.path, self.origin)


@dataclass(frozen=True)
class LoadedImage:
    """An image that is already decoded."""

    key: str
    image: Image.Image = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        return self.image.convert("RGB")


def _decode(source: ImagePath | bytes, origin: str) -> Image.Image:
    try:
        return load_image(source, origin)  # as in training
    except UserError as error:
        raise UnreadableImageError(str(error)) from error
