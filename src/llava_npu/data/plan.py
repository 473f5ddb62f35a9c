"""The order of a whole run, as a pure function of (number of samples, epochs, batch size, seed).

Step *i* is a look-up, so an interrupted run resumes at exactly its next sample without any loader state: the plan is
computed again from the same four numbers, and the data file's `fingerprint` says whether it is still the same data.

A `BatchLayout` says what each forward pass of a process takes of it: a few samples that are padded to the longest
(`PaddedLayout`), or a pack (`packing.PackedLayout`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llava_npu.errors import UserError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Which samples each optimizer step sees.

    The epochs are laid end to end, each in an order of its own, and cut into global batches, so a batch may hold the
    end of one epoch and the start of the next. The last batch is filled up from the following epoch's order: every
    batch is whole (no rank without work, no odd shape), and all samples are seen `epochs` times, at most
    `global_batch_size` − 1 of them once more. With a broken number of epochs the run ends within an epoch.

    With `counts_epochs` sample *i* of epoch *e* is number *e* · `num_samples` + *i*, for samples that differ by epoch.
    """

    num_samples: int
    global_batch_size: int
    epochs: float = 1.0
    seed: int = 0
    counts_epochs: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError("the data set is empty: a run needs at least one sample")
        if self.global_batch_size < 1:
            raise UserError(f"global batch size {self.global_batch_size}: it must be at least 1")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise UserError(f"epochs {self.epochs}: it must be a positive number")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: it must not be negative")

    @property
    def num_steps(self) -> int:
        return math.ceil(math.ceil(self.num_samples * self.epochs) / self.global_batch_size)

    def step(self, step: int) -> Indices:
        """The samples of one optimizer step, counted from 0; shape (global_batch_size,)."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan of {self.num_steps}")
        return self.order(step * self.global_batch_size, self.global_batch_size)

    def order(self, start: int, length: int) -> Indices:
        """`length` samples of the whole run, from position `start` on; shape (length,)."""
        samples = plan_order(self.num_samples, self.seed, start, length)
        if self.counts_epochs:
            samples += np.arange(start, start + length) // self.num_samples * self.num_samples
        return samples

    @property
    def num_epochs(self) -> int:
        """How many epochs the run touches, the one that fills up its last batch included."""
        return math.ceil(self.num_steps * self.global_batch_size / self.num_samples)


def plan_order(num_samples: int, seed: int, start: int, length: int) -> Indices:
    """`length` samples of the endless order that `seed` gives, from position `start` on; shape (length,)."""
    positions = np.arange(start, start + length, dtype=np.int64)
    epochs, within = np.divmod(positions, num_samples)
    order = np.empty(length, dtype=np.int64)
    for epoch in range(start // num_samples, (start + length - 1) // num_samples + 1):
        here = epochs == epoch
        order[here] = epoch_order(num_samples, seed, epoch)[within[here]]
    return order


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> Indices:
    """The permutation of one epoch; read-only, shape (num_samples,).

    Samples are sorted by the raw output of PCG64. NumPy promises that stream to be the same in every version and on
    every machine, which it does not of `Generator.permutation`.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def micro_batches(batch: Indices, rank: int, world_size: int, micro_batch_size: int) -> Indices:
    """One rank's share of a global batch; shape (accumulation steps, micro_batch_size).

    Micro step *a* of all ranks together holds a consecutive stretch of the batch, so the samples of a step are the same
    set whichever way they are spread over ranks and accumulation steps.

    Raises:
        UserError: the batch does not divide evenly, which would leave ranks waiting for each other.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    share = world_size * micro_batch_size
    if micro_batch_size < 1 or len(batch) % share:
        fits = max(len(batch) // share, 1) * share
        raise UserError(
            f"global batch size {len(batch)} is not a multiple of {world_size} device(s) × micro batch "
            f"{micro_batch_size}; use {fits} or {fits + share}, or another micro batch size"
        )
    steps = batch.reshape(-1, world_size, micro_batch_size)  # (accumulation, world, micro)
    return steps[:, rank]


class BatchLayout(Protocol):
    """Which samples each forward pass of a process takes: a pure function of the step, like the plan it lays out."""

    @property
    def num_steps(self) -> int: ...

    @property
    def pack_length(self) -> int | None:
        """Tokens of a row that holds several samples; None: each sample is a row of its own, padded."""

    def share(self, step: int, rank: int) -> Sequence[Indices]:
        """The samples of each micro-batch of one process, as many micro-batches for every rank."""

    def room(self, sample: int) -> int | None:
        """The most tokens that this sample, or another in its place, may have; None: no more is known."""


@dataclass(frozen=True)
class PaddedLayout:
    """As many samples at once as fit, whatever their lengths."""

    plan: Plan
    num_processes: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        self.share(0, 0)  # a batch that does not divide is an error now, not when the first one is asked for

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def pack_length(self) -> None:
        return None

    def share(self, step: int, rank: int) -> Sequence[Indices]:
        return list(micro_batches(self.plan.step(step), rank, self.num_processes, self.micro_batch_size))

    def room(self, sample: int) -> None:
        return None
