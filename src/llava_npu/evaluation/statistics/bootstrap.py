"""Confidence intervals by resampling groups.

Rows of one group (rotations of one question, questions about one image) are not independent, so groups are drawn with
replacement, not rows: the cluster bootstrap with percentile limits (Efron and Tibshirani 1993, An Introduction to the
Bootstrap). At the edge, where every group is right or every group is wrong, resampling cannot vary and the interval is
a single point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 20240913
_CHUNK_ELEMENTS = 4_000_000  # counts held at once

Array = npt.NDArray[np.float64]


def resample(amounts: Sequence[Sequence[float]] | Array, seed: int = SEED) -> Array:
    """Sums over groups drawn with replacement, as many as there are.

    Args:
        amounts: (groups, quantities), what each group contributes.
        seed: the same input and seed give the same sums.

    Returns:
        (RESAMPLES, quantities).
    """
    weights = np.asarray(amounts, float)  # (groups, quantities)
    num_groups = len(weights)
    generator = np.random.default_rng(seed)
    sums = []
    remaining = RESAMPLES
    while remaining:
        size = min(remaining, max(1, _CHUNK_ELEMENTS // num_groups))
        counts = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=size)
        sums.append(counts @ weights)  # (size, quantities)
        remaining -= size
    return np.concatenate(sums)


def limits(values: Array) -> tuple[float, float]:
    """The 95 % percentile limits of a statistic's resampled values."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


class Interval(Protocol):
    """A number with the limits of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def interval_text(interval: Interval, scale: float = 100, digits: int = 1) -> str:
    """A number with its interval, by default in percent."""
    low, value, high = (f"{scale * each:.{digits}f}" for each in (interval.low, interval.value, interval.high))
    return f"{value} ({low}–{high})"


def difference_text(difference: Interval, scale: float = 100, digits: int = 1) -> str:
    """A difference with its interval, by default in percentage points."""
    value, low, high = (signed(scale * each, digits) for each in (difference.value, difference.low, difference.high))
    return f"{value} ({low} to {high})"


def signed(number: float, digits: int) -> str:
    """A number with its sign, as a difference is written."""
    text = f"{number:+.{digits}f}"
    return "±" + text[1:] if float(text) == 0 else text.replace("-", "−")


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """95 % interval of Σ numerators / Σ denominators over groups: one numerator and one denominator per group.

    The same input gives the same interval. Groups whose denominator is 0 must not be passed.
    """
    sums = resample(list(zip(numerators, denominators, strict=True)))
    return limits(sums[:, 0] / sums[:, 1])
