"""Samples that are held out of training, to validate on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from llava_npu.data.formats.parsing import Record
from llava_npu.data.mixtures import Mixture
from llava_npu.data.plan import Indices, epoch_order
from llava_npu.errors import UserError

_SEED, _EPOCH = 0, 1  # epoch 0 of that seed draws what a source's limit takes


class Subset(Sequence[Record]):
    """Some of the records, in their order; each is read when asked for."""

    def __init__(self, records: Sequence[Record], chosen: Indices) -> None:
        self._records = records
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._records[int(each)] for each in self._chosen[index]]
        return self._records[int(self._chosen[index])]


def hold_out(records: Sequence[Record], count: int) -> tuple[Subset, Subset]:
    """(what is left to train on, what is held out): `count` records drawn at random, the same in every run.

    A record that a mixture repeats is held out as a whole: none is in both.

    Raises:
        UserError: nothing would be left.
    """
    of_record = records.record_numbers() if isinstance(records, Mixture) else np.arange(len(records))
    distinct, first = np.unique(of_record, return_index=True)
    if not 0 < count < len(distinct):
        raise UserError(
            f"data.validation: {count} of {len(distinct)} records are to be held out; at least one, and not all."
        )
    drawn = np.sort(epoch_order(len(distinct), _SEED, _EPOCH)[:count])
    held = np.isin(of_record, distinct[drawn])
    return Subset(records, np.flatnonzero(~held)), Subset(records, np.sort(first[drawn]))
