"""Packs: several samples in one row of a fixed number of tokens, planned ahead for a whole run.

A step has exactly `global_batch_size` samples, packed or not. What packing decides is which of them share a row, and
which samples meet in a step: within a stretch of steps they are dealt out so that all steps have nearly as many images
and tokens. So every step fills the same number of packs of the same length, on every rank: no shape changes during a
run (an NPU prepares each new shape again), and little of a pack is padding.

Everything is a pure function of (plan, token counts, token budget, number of processes). Which samples a step has does
not depend on the number of processes, so a run may resume with another number.

Attention within a pack is per sample (`ops/attention`); nothing here knows of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_npu.data.plan import Indices, Plan
from llava_npu.errors import UserError

# Steps between which samples are exchanged to make them alike: the more, the more alike.
STRETCH = 128
# Matrix units work on tiles of this many rows; a pack is a whole number of them.
TILE = 128
# Steps that are looked at to choose a run's packs. A step that needs more of them gets more (`PackedLayout`).
SAMPLED_STEPS = 256
# Tokens that an image weighs beyond its own, for the vision tower's work.
IMAGE_WEIGHT = 16


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """What each sample of an epoch brings; with `Plan.counts_epochs`, those of all epochs, one after the other.

    Args:
        tokens: integers, shape (num_samples,), images included, as cut to the run's `max_length`.
        images: likewise, how many it has.
    """

    tokens: NDArray[Any]
    images: NDArray[Any]


@dataclass(frozen=True, eq=False)
class AlikePlan:
    """A plan whose steps are made alike in tokens and images.

    A stretch of steps has the same samples as in the plan, so all are seen as often; it is never longer than an epoch.
    """

    plan: Plan
    counts: TokenCounts

    def step(self, step: int) -> Indices:
        """The samples of one optimizer step, counted from 0; shape (global_batch_size,)."""
        if not 0 <= step < self.plan.num_steps:
            raise IndexError(f"step {step} of a plan of {self.plan.num_steps}")
        stretch, within = divmod(step, self.stretch_length)
        return _dealt(self, stretch)[within]

    @property
    def stretch_length(self) -> int:
        return min(STRETCH, max(1, self.plan.num_samples // self.plan.global_batch_size))


@lru_cache(maxsize=4)
def _dealt(alike: AlikePlan, stretch: int) -> Indices:
    """The samples of a stretch, dealt to its steps; shape (steps, global_batch_size).

    Sorted by images, then tokens, they are dealt row by row, every second row backwards.
    """
    plan, counts = alike.plan, alike.counts
    first = stretch * alike.stretch_length
    steps = min(alike.stretch_length, plan.num_steps - first)  # the last stretch ends with the run
    batch = plan.global_batch_size
    samples = plan.order(first * batch, steps * batch)
    order = np.lexsort((-counts.tokens[samples], -counts.images[samples]))
    rows = samples[order].reshape(batch, steps)
    rows[1::2] = rows[1::2, ::-1]
    return rows.T


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Each micro-batch of a process is one pack.

    Args:
        pack_length: tokens of every pack; what its samples do not fill is padding at the end.
        packs_per_process: in a step. A step that does not fit has one or a few more, the same for all processes.
    """

    alike: AlikePlan
    num_processes: int
    pack_length: int
    packs_per_process: int

    @property
    def num_steps(self) -> int:
        return self.alike.plan.num_steps

    def share(self, step: int, rank: int) -> Sequence[Indices]:
        if not 0 <= rank < self.num_processes:
            raise ValueError(f"rank {rank} of {self.num_processes}")
        return _packs(self, step)[rank :: self.num_processes]

    def room(self, sample: int) -> int:
        return int(self.alike.counts.tokens[sample])

    def fill(self, steps: int = 64) -> float:
        """The part of the packs that is not padding, over some steps of the run."""
        tokens = self.alike.counts.tokens
        packs = [pack for step in _spread(self.num_steps, steps) for pack in _packs(self, step)]
        return sum(int(tokens[pack].sum()) for pack in packs) / (len(packs) * self.pack_length)


@lru_cache(maxsize=4)
def _packs(layout: PackedLayout, step: int) -> list[Indices]:
    """All packs of a step. Neighbours, which are computed at the same time, have like numbers of images."""
    samples, counts = layout.alike.step(step), layout.alike.counts
    number = layout.packs_per_process * layout.num_processes
    packs = balanced_packs(samples, counts, number)
    while max(counts.tokens[pack].sum() for pack in packs) > layout.pack_length:
        number += layout.num_processes
        packs = balanced_packs(samples, counts, number)
    return sorted(packs, key=lambda pack: -int(counts.images[pack].sum()))


def plan_packs(plan: Plan, counts: TokenCounts, pack_tokens: int, num_processes: int) -> PackedLayout:
    """Chooses the number of packs and their length for a run: of those that fit, the ones with the least padding.

    Args:
        pack_tokens: the most tokens of a pack. Packs are as long as the samples of a step need, in whole tiles.

    Raises:
        UserError: a sample is longer than `pack_tokens`, or a batch does not divide over the processes.
    """
    longest = int(counts.tokens.max())
    if longest > pack_tokens:
        raise UserError(
            f"pack_tokens {pack_tokens}: the longest sample has {longest} tokens; set pack_tokens to at least that, or "
            "data.max_length lower"
        )
    if plan.global_batch_size % num_processes:
        fits = max(plan.global_batch_size // num_processes, 1) * num_processes
        raise UserError(
            f"batch size {plan.global_batch_size} is not a multiple of {num_processes} devices; use {fits} or "
            f"{fits + num_processes}"
        )
    alike = AlikePlan(plan, counts)
    steps = [alike.step(step) for step in _spread(plan.num_steps, SAMPLED_STEPS)]
    most = max(int(counts.tokens[samples].sum()) for samples in steps)
    fewest = -(-most // (num_processes * pack_tokens))
    fitting: list[tuple[int, int]] = []  # (packs per process, their length)
    for packs in range(fewest, plan.global_batch_size // num_processes + 1):
        length = max(longest, *(_fullest(samples, counts, packs * num_processes) for samples in steps))
        if length <= pack_tokens:
            fitting.append((packs, min(-(-length // TILE) * TILE, pack_tokens)))
        if len(fitting) == 3:
            break
    packs, length = min(fitting, key=lambda found: (found[0] * found[1], found[0]))
    return PackedLayout(alike, num_processes, pack_length=length, packs_per_process=packs)


def balanced_packs(samples: Indices, counts: TokenCounts, number: int) -> list[Indices]:
    """Spreads samples over `number` packs, at most as many as samples, so that the fullest has little more than others.

    The heaviest sample first, each goes to the lightest pack (Graham's rule of the longest processing time, 1969), and
    among equals to one with fewer images.
    """
    images = counts.images[samples]
    weights = counts.tokens[samples] + IMAGE_WEIGHT * images
    packs: list[list[int]] = [[] for _ in range(number)]
    lightest = [(0, 0, pack) for pack in range(number)]  # a heap of (weight, images, pack)
    for place in np.argsort(-weights, kind="stable").tolist():
        weight, of_pack, pack = lightest[0]
        packs[pack].append(int(samples[place]))
        heapq.heapreplace(lightest, (weight + int(weights[place]), of_pack + int(images[place]), pack))
    return [np.array(pack, dtype=np.int64) for pack in packs]


def _fullest(samples: Indices, counts: TokenCounts, number: int) -> int:
    return max(int(counts.tokens[pack].sum()) for pack in balanced_packs(samples, counts, number))


def _spread(num_steps: int, most: int) -> list[int]:
    """At most this many steps, evenly over a run."""
    return np.unique(np.linspace(0, num_steps - 1, min(most, num_steps)).round().astype(int)).tolist()
