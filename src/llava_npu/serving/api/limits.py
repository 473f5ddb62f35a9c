"""How much one request, and all of them together, may take."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        max_waiting: requests beyond those being answered; one more is refused (429).
        max_request_bytes: of a request's body; pictures in it are a third larger than their files.
        max_held_bytes: of all bodies that are being read or answered; beyond, requests are refused (429).
        max_images: pictures of one request, those of earlier turns included.
        max_image_pixels: of one picture, unpacked.
        max_new_tokens: longest answer that may be asked for.
        request_timeout: seconds for one request, from its arrival to the end of its answer.
        read_timeout: seconds without any byte of a request's body, and for fetching one picture.
    """

    max_waiting: int = 64
    max_request_bytes: int = 32 * MIB
    max_held_bytes: int = 512 * MIB
    max_images: int = 8
    max_image_pixels: int = 25_000_000
    max_new_tokens: int = 1024
    request_timeout: float = 300.0
    read_timeout: float = 20.0
