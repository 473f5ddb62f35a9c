"""How much one request, one client, and all of them together may take."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from llava_npu.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        max_waiting: requests beyond those being answered; one more is refused (429).
        max_request_bytes: of a request's body; images in it are a third larger than their files.
        max_uploads_per_client: bodies that one client may be sending at a time; one more is refused (429).
        max_images: images of one request, those of earlier turns included.
        max_image_pixels: of one image, unpacked.
        max_new_tokens: longest answer that may be asked for.
        request_timeout: seconds for one request, from the end of its head to the end of its answer.
        read_timeout: seconds for a request's head, without any byte of its body, and for fetching one image.

    Raises:
        UserError: one that is not a finite number above 0; no waiting request and no image may be wanted.
    """

    max_waiting: int = 64
    max_request_bytes: int = 32 * MIB
    max_uploads_per_client: int = 128
    max_images: int = 8
    max_image_pixels: int = 25_000_000
    max_new_tokens: int = 1024
    request_timeout: float = 300.0
    read_timeout: float = 20.0

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name in ("max_waiting", "max_images")))):
                raise UserError(f"{name} is {value}; a number above 0 is expected.")

    @property
    def max_held_bytes(self) -> int:
        """Of all bodies that are being read or answered; beyond, requests are refused (429)."""
        return max(512 * MIB, 4 * self.max_request_bytes)

    @property
    def max_held_bytes_per_client(self) -> int:
        """The same for one client: a quarter, so that no single one can use up what is there for all."""
        return self.max_held_bytes // 4
