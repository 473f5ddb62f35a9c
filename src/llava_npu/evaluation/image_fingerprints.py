"""Is an image file still the one that was answered about? Told from its size, its beginning and its end.

The question file's checksum covers images that it carries; those that lie beside it can change unseen. Reading all of
them again would cost gigabytes at every start. A few kilobytes tell as much: an encoded image that was replaced,
resized or saved anew differs in length or in its ends (a PNG's end holds a checksum of its pixels). No time stamps, so
that data which was copied or unpacked again is the same data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_npu.data.image_sources import ImageFile, ImageSource

_END = 4096  # bytes
_DIGITS = 16  # hexadecimal; they tell files apart and defend against nobody


def fingerprint_images(images: Sequence[ImageSource]) -> str | None:
    """One short fingerprint of a question's image files, missing ones included; None if it has none."""
    files = [image for image in images if isinstance(image, ImageFile)]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(_sample(file))
    return digest.hexdigest()[:_DIGITS]


def fingerprint_all(images: Mapping[str, str | None]) -> str | None:
    """One fingerprint of what `fingerprint_images` gave for each question, by its id; None if there are no files."""
    lines = [f"{name}\t{fingerprint}\n" for name, fingerprint in sorted(images.items()) if fingerprint is not None]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:_DIGITS] if lines else None


def _sample(image: ImageFile) -> bytes:
    try:
        if not isinstance(image.path, Path):  # in an archive: there is no reading from its end
            return hashlib.sha256(image.path.read_bytes()).digest()
        with image.path.open("rb") as file:
            start = file.read(_END)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(len(start), size - _END))
            return b"%d\n" % size + hashlib.sha256(start + file.read(_END)).digest()
    except OSError:
        return b"unreadable"
