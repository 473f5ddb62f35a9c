"""Confidence intervals by resampling groups.

Rows of one group (rotations of one question) are not independent, so groups are drawn with replacement, not rows: the
cluster bootstrap with percentile limits (Efron and Tibshirani 1993, An Introduction to the Bootstrap). At the edge,
where every group is right or every group is wrong, resampling cannot vary and the interval is a single point.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 20240913
_CHUNK_ELEMENTS = 4_000_000  # counts held at once


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """95 % interval of Σ numerators / Σ denominators over groups: one numerator and one denominator per group.

    The same input gives the same interval. Groups whose denominator is 0 must not be passed.
    """
    weights = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=1)  # (groups, 2)
    num_groups = len(weights)
    generator = np.random.default_rng(SEED)
    ratios = []
    remaining = RESAMPLES
    while remaining:
        size = min(remaining, max(1, _CHUNK_ELEMENTS // num_groups))
        counts = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=size)
        totals = counts @ weights  # (size, 2)
        ratios.append(totals[:, 0] / totals[:, 1])
        remaining -= size
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)
