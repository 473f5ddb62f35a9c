"""How large micro-batches are and may be: rows of padded samples, or the tokens of a packed row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llava_npu.config import RunConfig
from llava_npu.data.packing import TILE, TokenCounts, plan_packs
from llava_npu.data.plan import Plan
from llava_npu.errors import UserError
from llava_npu.planning.dry_run import BatchShape
from llava_npu.planning.samples import Samples
from llava_npu.training.data import num_groups


@dataclass(frozen=True)
class Sizing:
    """The sizes of a run's micro-batches.

    Attributes:
        packed: whether a size counts the tokens of a packed row (`pack_tokens`), or rows (`micro_batch_size`).
        configured: the run's own; of packed rows, the length that they will have.
        candidates: what it might be, the largest first.
        per_group: samples of a step for one device, or for those that work on a sequence together.
        parts: how many do (`sequence_parallel_size`).
    """

    packed: bool
    configured: int
    candidates: tuple[int, ...]
    per_group: int
    samples: Samples
    cached_features: bool
    parts: int = 1

    @property
    def key(self) -> str:
        """Its name in the run's configuration."""
        return "pack_tokens" if self.packed else "micro_batch_size"

    def tokens(self, size: int) -> float:
        """In a micro-batch, over the devices that share it, on average, padding not counted."""
        return size if self.packed else size * self.samples.mean_length

    def accumulated(self, size: int) -> int:
        """Micro-batches of this size in a step."""
        return max(1, math.ceil(self.per_group * self.samples.mean_length / self.tokens(size)))

    def shape(self, size: int) -> BatchShape:
        """What one device has of the micro-batch that takes the most memory: padded, one row is of the longest sample,
        and all with it.
        """
        return self._whole(size).part(self.parts)

    def typical(self, size: int) -> BatchShape:
        """What one device has of an average micro-batch."""
        samples, share = self.samples, self.per_group / self.accumulated(size)
        count = max(1, round(share))
        ordered = sorted(samples.lengths)
        spread = [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)]
        rows, length = (1, size) if self.packed else (count, round(samples.padded_length(count)))
        filled = length * rows / sum(spread)
        if self.packed:
            lengths = [int(each * min(1.0, filled)) for each in spread]
            lengths.append(size - sum(lengths))
        else:
            lengths = [part for each in spread for part in (min(each, length), length - min(each, length))]
        supervised = min(max(1, round(share * samples.supervised)), rows * (length - 1))
        images, sequences = round(share * samples.images), count if self.packed else 1
        shape = BatchShape(rows, length, supervised, images, sequences, self.cached_features, tuple(lengths))
        return shape.part(self.parts)

    def _whole(self, size: int) -> BatchShape:
        samples = self.samples
        if self.packed:
            sequences = max(1, math.ceil(size / samples.mean_length))
            images, supervised = math.ceil(sequences * samples.images), math.ceil(sequences * samples.supervised)
            return BatchShape(1, size, min(supervised, size - 1), images, sequences, self.cached_features)
        images = math.ceil(samples.images) * (size - 1) + samples.most_images
        supervised = min(math.ceil(samples.supervised), samples.longest - 1) * size
        return BatchShape(size, samples.longest, supervised, images, cached_features=self.cached_features)


def choose_sizing(config: RunConfig, samples: Samples, devices: int) -> Sizing:
    """The sizes of a run on this many devices.

    Raises:
        UserError: the batch does not divide over the devices.
    """
    groups = num_groups(config, devices)
    if config.batch_size % groups:
        below = max(config.batch_size // groups, 1) * groups
        of_devices = "" if groups == devices else f"groups of {config.sequence_parallel_size} "
        raise UserError(
            f"batch_size: {config.batch_size} does not divide over {groups} {of_devices}devices; use {below} or "
            f"{below + groups}."
        )
    share = config.batch_size // groups
    cached = bool(config.data.cache_features)  # "auto": if the disk has room
    parts = config.sequence_parallel_size
    if config.pack_tokens is None:
        divisors = tuple(rows for rows in range(share, 0, -1) if share % rows == 0)
        return Sizing(False, min(config.micro_batch_size, share), divisors, share, samples, cached, parts)
    configured = _pack_length(config, samples, groups)
    least = math.ceil(samples.longest / TILE)
    tiles = range(max(least, math.ceil(share * samples.mean_length / TILE)), least - 1, -1)
    return Sizing(True, configured, tuple(TILE * tile for tile in tiles), share, samples, cached, parts)


def _pack_length(config: RunConfig, samples: Samples, groups: int) -> int:
    """The length of the rows that packing will make: at most `pack_tokens`, and no longer than a step needs."""
    assert config.pack_tokens is not None
    if max(samples.lengths) > config.pack_tokens:
        return config.pack_tokens  # packing refuses such a sample, by its name
    counts = TokenCounts(np.array(samples.lengths), np.array(samples.image_counts))
    plan = Plan(len(samples.lengths), config.batch_size, seed=config.seed)
    return plan_packs(plan, counts, config.pack_tokens, groups).pack_length
