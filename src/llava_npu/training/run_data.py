"""The data of a run, from its configuration: one source or a mixture, opened, and checked where it is small."""

from __future__ import annotations

from collections.abc import Sequence

from llava_npu.config import DataConfig
from llava_npu.data.bad_samples import BadSamples
from llava_npu.data.image_roots import ImagePath
from llava_npu.data.records import Record, Source, fingerprint, open_sources
from llava_npu.errors import UserError

# Checking this many takes seconds; more of them are checked as they are read.
CHECKED_AT_START = 100_000


def sources(config: DataConfig) -> list[Source]:
    """What the run reads; `image_root` serves the sources that name none."""
    if config.path is not None:
        return [Source(config.path, config.image_root, allow_absolute_paths=config.allow_absolute_paths)]
    return [
        Source(
            source.path,
            source.image_root or config.image_root,
            source.weight,
            source.limit,
            config.allow_absolute_paths,
        )
        for source in config.sources
    ]


def open_run_data(config: DataConfig) -> Sequence[Record]:
    """The samples of one epoch.

    Raises:
        UserError: a file cannot be read; or, in a set small enough to check here, a record is wrong and
            `bad_samples` is 'error'.
    """
    records = open_sources(sources(config))
    if config.bad_samples == "error" and len(records) <= CHECKED_AT_START:
        for _ in records:
            pass
    return records


def data_fingerprint(config: DataConfig) -> str:
    """Of the content of all sources, in their order."""
    return fingerprint(*(source.path for source in sources(config)))


def images_of(records: Sequence[Record], bad_samples: BadSamples) -> list[ImagePath]:
    """All images of the run, each once; those of records that cannot be used are left out or, with 'error', raised."""
    images: dict[ImagePath, None] = {}
    for index in range(len(records)):
        try:
            images.update(dict.fromkeys(records[index].image_paths))
        except UserError:
            if bad_samples == "error":
                raise
    return list(images)
