"""Samples that are held out of training, to validate on: never trained on, by content."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llava_npu.data.conversation.turns import IMAGE_MARK
from llava_npu.data.formats.parsing import Record, RecordSequence
from llava_npu.data.image_roots import ImagePath
from llava_npu.data.mixtures import Mixture
from llava_npu.data.plan import Indices, epoch_order
from llava_npu.errors import UserError

_SEED, _EPOCH = 0, 1  # epoch 0 of that seed draws what a source's limit takes


class Subset(RecordSequence):
    """Some of the records, in their order; each is read when asked for."""

    def __init__(self, records: Sequence[Record], chosen: Indices) -> None:
        self._records = records
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def _record(self, index: int) -> Record:
        return self._records[int(self._chosen[index])]


def hold_out(
    records: Sequence[Record], *, size: int | None = None, fraction: float | None = None
) -> tuple[Subset, Subset]:
    """(what is left to train on, what is held out): distinct records drawn at random, the same in every run.

    A record that a mixture repeats, or that stands in several sources or files, is held out as a whole: nothing that is
    held out is trained on, by content.

    Args:
        size, fraction: how many distinct records; one of the two.

    Raises:
        UserError: nothing would be left.
    """
    (ids,) = content_ids(records)
    distinct, first = np.unique(ids, return_index=True)
    count = max(1, round((fraction or 0) * len(distinct))) if size is None else size
    if not 0 < count < len(distinct):
        raise UserError(
            f"data.validation: {count} of {len(distinct)} distinct records would be held out; hold out at least one, "
            "and leave at least one to train on."
        )
    drawn = np.sort(epoch_order(len(distinct), _SEED, _EPOCH)[:count])
    held = np.isin(ids, distinct[drawn])
    return Subset(records, np.flatnonzero(~held)), Subset(records, np.sort(first[drawn]))


def leave_out(records: Sequence[Record], held: Sequence[Record]) -> Sequence[Record]:
    """The records whose content is not among `held`, which may come from another file.

    Raises:
        UserError: nothing would be left.
    """
    ids, of_held = content_ids(records, held)
    left = np.flatnonzero(~np.isin(ids, of_held))
    if not len(left):
        raise UserError(
            "data.validation.path: it holds every record of the training data, and what is validated on is never "
            "trained on. Give other data, or data.validation.fraction to hold out a part."
        )
    return records if len(left) == len(records) else Subset(records, left)


def content_ids(*sequences: Sequence[Record]) -> list[Indices]:
    """For each sample of each sequence a number that samples of equal content share: equal words, equal images.

    Spaces, the places of the images' marks and what is excluded from the loss do not count: a template moves the one,
    and whether an answer is learned makes no other sample of it.

    Images are equal if they are one file, or have the same bytes; they are read only where the words are equal and the
    sizes too. A record that cannot be used is equal to none but itself.
    """
    numbers = [_record_numbers(records) for records in sequences]
    offsets = np.cumsum([0, *(int(each.max(initial=-1)) + 1 for each in numbers)])
    groups: dict[bytes, list[tuple[int, Record]]] = defaultdict(list)
    canonical: dict[int, int] = {}
    for records, of_record, offset in zip(sequences, numbers, offsets[:-1], strict=True):
        for number, index in zip(*np.unique(of_record, return_index=True), strict=True):
            identity = int(offset + number)
            canonical[identity] = identity
            try:
                record = records[int(index)]
            except UserError:
                continue
            groups[_digest(repr(_words(record)).encode())].append((identity, record))
    for group in groups.values():
        if len(group) > 1:
            canonical.update(_same_images(group))
    return [
        np.array([canonical[int(offset + number)] for number in of_record])
        for of_record, offset in zip(numbers, offsets[:-1], strict=True)
    ]


def _words(record: Record) -> list[tuple[str, list[str]]]:
    return [(turn.role, turn.text.replace(IMAGE_MARK, " ").split()) for turn in record.conversations]


def _record_numbers(records: Sequence[Record]) -> Indices:
    """For each sample the number of its record: a mixture repeats some."""
    return records.record_numbers() if isinstance(records, Mixture) else np.arange(len(records))


def _same_images(group: list[tuple[int, Record]]) -> dict[int, int]:
    """The first record of equal images for each one, of records with equal turns."""
    known: dict[tuple[object, ...], int] = {}
    sizes = Counter(_images(record, _size) for _, record in group)
    found = {}
    for identity, record in group:
        key = _images(record, _size)
        if sizes[key] > 1 and record.images:
            key = _images(record, _content)
        found[identity] = known.setdefault(key, identity)
    return found


def _images(record: Record, describe: Callable[[ImagePath], object]) -> tuple[object, ...]:
    try:
        return tuple(describe(path) for path in record.image_paths)
    except UserError:  # refused when it is trained on
        return (record.origin,)


def _size(path: ImagePath) -> object:
    try:
        return path.stat().st_size if isinstance(path, Path) else None
    except OSError:
        return str(path)


def _content(path: ImagePath) -> object:
    try:
        return _digest(path.read_bytes())
    except OSError:
        return str(path)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
