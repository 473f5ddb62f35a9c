"""Do two models differ on the same questions? Two paired tests.

Bootstrap: groups are drawn with replacement, the same for both models; the interval of the difference, and how often it
has the other sign (two-sided; Efron and Tibshirani 1993, An Introduction to the Bootstrap). For every score.

McNemar's exact test: of the questions (or groups) that just one of the two has right, how likely is a division as
uneven as this, or more so, if each were as likely to go either way (McNemar 1947, Psychometrika 12)? For scores that
are a share of right ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from llava_npu.evaluation.statistics.accuracy import STATISTICS, Sample
from llava_npu.evaluation.statistics.bootstrap import RESAMPLES, SEED, Array, limits, resample


@dataclass(frozen=True)
class McNemar:
    """Groups that only the first, and only the second model has right, and the p value."""

    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True)
class PairedDifference:
    """The second model's score minus the first's.

    Attributes:
        value, low, high: with its 95 % interval.
        p: of the bootstrap, two-sided.
        mcnemar: None where the score is not a share of correct answers.
        groups: how many both have.
        unmatched: how many only one of them has; these are left out.
    """

    value: float
    low: float
    high: float
    p: float
    mcnemar: McNemar | None
    groups: int
    unmatched: int


def paired_difference(first: Sample, second: Sample) -> PairedDifference | None:
    """Compares two samples of the same score; None if they have no group in common."""
    return paired_differences([first, second], [(0, 1)])[0]


def paired_differences(samples: Sequence[Sample], pairs: Sequence[tuple[int, int]]) -> list[PairedDifference | None]:
    """Compares several samples of the same score, all on the groups that every one of them has.

    Args:
        samples: of the models.
        pairs: places in `samples`: (first, second) gives the second's score minus the first's.

    Returns:
        for each pair its difference; None if no group is common to all.
    """
    common = sorted(set.intersection(*(set(sample.groups) for sample in samples))) if samples else []
    if not common:
        return [None] * len(pairs)
    of_sums = STATISTICS[samples[0].statistic]
    strata: dict[str, list[Array]] = defaultdict(list)
    for key in common:
        strata[key[0]].append(np.concatenate([sample.groups[key] for sample in samples]))
    # All are drawn together: (draws, models × amounts) → (draws,) of each model
    sums = sum(resample(np.asarray(rows), SEED + number) for number, rows in enumerate(strata.values()))
    total = np.sum([row for rows in strata.values() for row in rows], axis=0, keepdims=True)
    drawn = [of_sums(part) for part in np.split(np.asarray(sums), len(samples), axis=1)]
    values = [float(of_sums(part)[0]) for part in np.split(total, len(samples), axis=1)]
    found: list[PairedDifference | None] = []
    for first, second in pairs:
        differences = drawn[second] - drawn[first]
        low, high = limits(differences)
        beyond = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
        found.append(
            PairedDifference(
                value=values[second] - values[first],
                low=low,
                high=high,
                p=min(1.0, 2 * (1 + beyond) / (1 + RESAMPLES)),
                mcnemar=_mcnemar(samples[first], samples[second], common),
                groups=len(common),
                unmatched=len(samples[first].groups.keys() ^ samples[second].groups.keys()),
            )
        )
    return found


def p_text(p: float) -> str:
    """A p value as people read it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mcnemar_p(only_first: int, only_second: int) -> float:
    """The exact two-sided p value: twice the smaller binomial tail at one half."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(comb(count, number) for number in range(fewer + 1)) / 2**count)


def _mcnemar(first: Sample, second: Sample, common: list[tuple[str, str]]) -> McNemar | None:
    pairs = [(first.groups[key], second.groups[key]) for key in common]
    if first.statistic != "ratio" or not all(one in ((0, 1), (1, 1)) for pair in pairs for one in pair):
        return None
    only_first = sum(a > b for (a, _), (b, _) in pairs)
    only_second = sum(a < b for (a, _), (b, _) in pairs)
    return McNemar(only_first, only_second, mcnemar_p(only_first, only_second))
