"""Confidence intervals by resampling groups.

Rows of one group (rotations of one question, questions about one image) are not independent, so groups are drawn with
replacement, not rows: the cluster bootstrap with percentile limits (Efron and Tibshirani 1993, An Introduction to the
Bootstrap). At the edge, where every group is right or every group is wrong, resampling cannot vary and the interval is
a single point.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """95 % interval of Σ numerators / Σ denominators over groups: one numerator and one denominator per group.

    The same input gives the same interval. Groups whose denominator is 0 must not be passed.
    """
    sums = resample(list(zip(numerators, denominators, strict=True)))
    return limits(sums[:, 0] / sums[:, 1])
