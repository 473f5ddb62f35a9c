"""Sizes of published data sets, so that their recipes can be planned without a download."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedData:
    """A published data set, as the means that a plan needs.

    Attributes:
        samples: conversations in the file, as its publisher counts them.
        images: images per sample, likewise.
        words: tokens per sample without the image's, and of them `supervised`; this project's estimates.
        longest: tokens without the image's of the longest samples; None: longer than any `max_length` in use.
    """

    samples: int
    images: float
    words: int
    supervised: int
    longest: int | None
    source: str


# By file name.
_DATA = {
    "blip_laion_cc_sbu_558k.json": PublishedData(
        558_128, 1.0, 26, 24, 128, "LLaVA-Pretrain (558,128 captions, estimated at 26 tokens in addition to the image)"
    ),
    "llava_v1_5_mix665k.json": PublishedData(
        665_298,
        0.939,
        184,
        100,
        None,
        "LLaVA's mix665k (665,298 conversations, 624,610 with an image; estimated at 184 tokens in addition to it)",
    ),
}


def published_data(file_name: str) -> PublishedData | None:
    """The data set that is published under this file name; None for any other."""
    return _DATA.get(file_name)
