"""Do two models differ on the same questions? Two paired tests.

Bootstrap: groups of questions are drawn with replacement, the same for both models; the interval of the difference, and
how often it has the other sign (two-sided; Efron and Tibshirani 1993, An Introduction to the Bootstrap). For every
score. Few groups vary too little when they are drawn (one not at all), so p is never less than the least that an exact
sign test of the d groups that differ can give: 2^(1 − d).

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

from llava_npu.evaluation.statistics.accuracy import STATISTICS, ScoreSample
from llava_npu.evaluation.statistics.bootstrap import RESAMPLES, SEED, Array, limits, resample

_ROUNDING = 1e-12
_SEEN = 1.96 + 0.84  # standard errors that a difference must have to be found at p < 0.05 with a power of 80 %


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


def paired_difference(first: ScoreSample, second: ScoreSample) -> PairedDifference | None:
    """Compares two samples of the same score; None if they have no group in common."""
    return paired_differences([first, second], [(0, 1)])[0]


def paired_differences(
    samples: Sequence[ScoreSample], pairs: Sequence[tuple[int, int]]
) -> list[PairedDifference | None]:
    """Compares several samples of the same score, all on the groups that every one of them has.

    Args:
        samples: of the models.
        pairs: places in `samples`: (first, second) gives the second's score minus the first's.

    Returns:
        for each pair its difference; None if no group is common to all.
    """
    common = _common_groups(samples)
    if not common:
        return [None] * len(pairs)
    values, drawn = _resampled(samples, common)
    amounts = [_amounts([sample], common) for sample in samples]
    found: list[PairedDifference | None] = []
    for first, second in pairs:
        differences = drawn[second] - drawn[first]
        low, high = limits(differences)
        found.append(
            PairedDifference(
                value=values[second] - values[first],
                low=low,
                high=high,
                p=_two_sided(differences, _num_differing(amounts[first], amounts[second])),
                mcnemar=_mcnemar(samples[first], samples[second], common),
                groups=len(common),
                unmatched=len(samples[first].groups.keys() ^ samples[second].groups.keys()),
            )
        )
    return found


@dataclass(frozen=True)
class SeededDifference:
    """The second model's mean score over its seeds minus the first's.

    Attributes:
        value, low, high, p: as in `PairedDifference`, over seeds and questions together.
        detectable: the difference that this many seeds and questions would show at p < 0.05 in four of five
            comparisons: 2.8 standard errors. None where nothing varies: one question, or equal answers.
    """

    value: float
    low: float
    high: float
    p: float
    detectable: float | None


def seeded_differences(
    models: Sequence[Sequence[ScoreSample]], pairs: Sequence[tuple[int, int]]
) -> list[SeededDifference | None]:
    """Compares models that were trained with several seeds each, by a two-level bootstrap.

    In each draw the questions are drawn with replacement, the same for all models, and of each model its seeds (Davison
    and Hinkley 1997, Bootstrap Methods and their Application, §3.8). Few seeds drawn with replacement vary too little,
    by (n − 1)/n in variance, so their deviations from the model's mean are scaled by √(n/(n − 1)) first. A model with
    one seed contributes no spread between seeds: its part is unknown, not zero.

    Args:
        models: of each model, one sample per seed.
        pairs: places in `models`: (first, second) gives the second's mean minus the first's.

    Returns:
        for each pair its difference; None if no group of questions is common to all.
    """
    samples = [sample for model in models for sample in model]
    common = _common_groups(samples)
    if not common:
        return [None] * len(pairs)
    values, drawn = _resampled(samples, common)
    generator = np.random.default_rng(SEED)
    means, spread, start = [], [], 0
    for model in models:
        seeds = slice(start, start + len(model))
        start += len(model)
        of_seeds = np.stack(drawn[seeds], axis=1)  # (draws, seeds)
        middle = of_seeds.mean(axis=1, keepdims=True)
        scale = np.sqrt(len(model) / (len(model) - 1)) if len(model) > 1 else 1.0
        chosen = generator.integers(len(model), size=of_seeds.shape)
        spread.append((middle + scale * np.take_along_axis(of_seeds - middle, chosen, axis=1)).mean(axis=1))
        means.append(float(np.mean(values[seeds])))
    amounts = [_amounts(model, common) for model in models]
    found: list[SeededDifference | None] = []
    for first, second in pairs:
        differences = spread[second] - spread[first]
        low, high = limits(differences)
        p = _two_sided(differences, _num_differing(amounts[first], amounts[second]))
        detectable = _SEEN * float(differences.std(ddof=1)) if np.ptp(differences) > _ROUNDING else None
        found.append(SeededDifference(means[second] - means[first], low, high, p, detectable))
    return found


def corrected(p_values: Sequence[float], method: str) -> list[float]:
    """p values corrected for their number.

    Args:
        method: "none"; "holm" (Holm 1979: the chance of any false finding); "benjamini-hochberg" (1995: the expected
            share of false ones among the findings).
    """
    if method == "none":
        return list(p_values)
    count = len(p_values)
    order = sorted(range(count), key=lambda place: p_values[place])
    found = [0.0] * count
    if method == "holm":
        highest = 0.0
        for rank, place in enumerate(order):
            highest = max(highest, min(1.0, (count - rank) * p_values[place]))
            found[place] = highest
    else:
        lowest = 1.0
        for rank, place in reversed(list(enumerate(order, start=1))):
            lowest = min(lowest, count / rank * p_values[place])
            found[place] = lowest
    return found


def _common_groups(samples: Sequence[ScoreSample]) -> list[tuple[str, str]]:
    return sorted(set.intersection(*(set(sample.groups) for sample in samples))) if samples else []


def _resampled(samples: Sequence[ScoreSample], common: Sequence[tuple[str, str]]) -> tuple[list[float], list[Array]]:
    """Each sample's value, and its values in draws of the groups, (draws,); the draws are the same for all."""
    of_sums = STATISTICS[samples[0].statistic]
    strata: dict[str, list[Array]] = defaultdict(list)
    for key in common:
        strata[key[0]].append(np.concatenate([sample.groups[key] for sample in samples]))
    # All are drawn together: (draws, models × amounts) → (draws,) of each model
    sums = sum(resample(np.asarray(rows), SEED + number) for number, rows in enumerate(strata.values()))
    total = np.sum([row for rows in strata.values() for row in rows], axis=0, keepdims=True)
    drawn = [of_sums(part) for part in np.split(np.asarray(sums), len(samples), axis=1)]
    return [float(of_sums(part)[0]) for part in np.split(total, len(samples), axis=1)], drawn


def _amounts(seeds: Sequence[ScoreSample], common: Sequence[tuple[str, str]]) -> Array:
    """What each group contributes in the mean over seeds, (groups, amounts)."""
    return np.mean([[seed.groups[key] for key in common] for seed in seeds], axis=0)


def _num_differing(first: Array, second: Array) -> int:
    return int(np.count_nonzero((first != second).any(axis=1)))


def _two_sided(differences: Array, num_differing: int) -> float:
    beyond = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return float(min(1.0, max(2 * (1 + beyond) / (1 + RESAMPLES), 2.0 ** (1 - num_differing))))


def p_text(p: float) -> str:
    """A p value as people read it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mcnemar_p(only_first: int, only_second: int) -> float:
    """The exact two-sided p value: twice the smaller binomial tail at one half."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(comb(count, number) for number in range(fewer + 1)) / 2**count)


def _mcnemar(first: ScoreSample, second: ScoreSample, common: list[tuple[str, str]]) -> McNemar | None:
    pairs = [(first.groups[key], second.groups[key]) for key in common]
    if first.statistic != "ratio" or not all(one in ((0, 1), (1, 1)) for pair in pairs for one in pair):
        return None
    only_first = sum(a > b for (a, _), (b, _) in pairs)
    only_second = sum(a < b for (a, _), (b, _) in pairs)
    return McNemar(only_first, only_second, mcnemar_p(only_first, only_second))
