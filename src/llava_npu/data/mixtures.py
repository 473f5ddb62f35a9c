"""Several data files as one: how often each is seen, and how much of it.

A mixture is a fixed list of samples, so the plan of a run (`plan.py`) sees nothing new, and the same sources give the
same list on every machine. Which records a limit or a broken weight picks does not depend on the run's seed: two seeds
compare two orders of the same data.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from llava_npu.data.formats.parsing import Record, RecordSequence
from llava_npu.data.plan import Indices, epoch_order
from llava_npu.errors import UserError

_SEED = 0


@dataclass(frozen=True)
class MixturePart:
    """A source in a mixture.

    Args:
        records: all that it holds.
        weight: how often each record is seen in an epoch. With 0.5 every second record is (the same ones in all
            epochs), with 1.5 all are, and every second one twice.
        limit: take no more records than this, drawn at random once and for all.
    """

    records: Sequence[Record]
    weight: float = 1.0
    limit: int | None = None

    def choose(self) -> Indices:
        """The records of one epoch, by their number; each pass over them in the same order."""
        available = len(self.records)
        taken = min(self.limit or available, available)
        wanted = round(self.weight * taken)
        if not wanted:
            raise UserError(
                f"data.sources: weight {self.weight} of {taken} records is less than one record; raise the weight"
            )
        is_whole = taken == available and wanted % taken == 0
        order = np.arange(taken) if is_whole else epoch_order(available, _SEED, 0)[:taken]
        return np.resize(order, wanted)


class Mixture(RecordSequence):
    """The samples of one epoch, part after part (the plan shuffles them)."""

    def __init__(self, parts: Sequence[MixturePart]) -> None:
        self._records = [part.records for part in parts]
        self._chosen = [part.choose() for part in parts]
        self._ends = list(accumulate(map(len, self._chosen)))

    def __len__(self) -> int:
        return self._ends[-1]

    def record_numbers(self) -> Indices:
        """For each sample a number that those have in common which are the same record of the same source."""
        offsets = accumulate((len(records) for records in self._records), initial=0)
        return np.concatenate([chosen + offset for chosen, offset in zip(self._chosen, offsets, strict=False)])

    def _record(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        within = index - (self._ends[part - 1] if part else 0)
        return self._records[part][int(self._chosen[part][within])]
