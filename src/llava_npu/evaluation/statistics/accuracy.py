"""Scores overall and by category, with intervals; and the accuracy of multiple-choice answers, circular and vanilla.

circular (CircularEval, Liu et al. 2023, MMBench, arXiv:2307.06281): a group counts as right only if every rotation of
    its options was answered right. A group that lacks a rotation that it is meant to have cannot be right: it counts as
    wrong and is reported. An option that stays in place in all rows of its group ("None of the above") is not rotated:
    such a group is meant to have one rotation less. The rules of VLMEvalKit score whatever rotations a file holds, as
    VLMEvalKit does, in every group whose unrotated row is there.
vanilla: the unrotated questions alone.
every rotation: all rows, each on its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.statistics.bootstrap import SEED, Array, limits, resample

CIRCULAR, VANILLA, EVERY_ROTATION = "circular", "vanilla", "every rotation"
_SCORES_ANY_ROTATIONS = "vlmevalkit"  # and "vlmevalkit+judge"
OVERALL, L2_CATEGORY, CATEGORY = LEVELS = "overall", "l2-category", "category"


@dataclass(frozen=True)
class ScoreSample:
    """What a score was computed from, so that it can be set against another model's.

    Attributes:
        statistic: how sums become the value, one of `STATISTICS`.
        groups: (stratum, group) → amounts.
    """

    statistic: str
    groups: Mapping[tuple[str, str], tuple[float, ...]]


@dataclass(frozen=True)
class Score:
    """One number of a report.

    Attributes:
        metric: "circular", "vanilla", …
        extraction: by which rule answers were read.
        split: the benchmark's split; "" if it has none.
        level: "overall", "l2-category" or "category"; `name` is which.
        value, low, high: in 0 … 1 (sums of such, in MME, go beyond 1), with the 95 % bootstrap interval.
        count: how many units (groups, or rows for "every rotation") were scored.
        sample: where it came from, for comparisons; it does not appear in a report.
    """

    metric: str
    extraction: str
    split: str
    level: str
    name: str
    value: float
    low: float
    high: float
    count: int
    sample: ScoreSample | None = field(default=None, compare=False, repr=False)

    def facts(self) -> dict[str, str | float | int]:
        """All but the sample, by name."""
        return {name: getattr(self, name) for name in SCORE_COLUMNS}


SCORE_COLUMNS = tuple(name for name in Score.__dataclass_fields__ if name != "sample")


@dataclass(frozen=True)
class Unit:
    """What one question or group contributes to one metric.

    Attributes:
        question: names its group, split and categories.
        amounts: summed over units, then put to the metric's statistic.
        trials: how many answers it counts for.
        stratum: for the intervals, the number of groups of each stratum is kept.
    """

    question: Question
    amounts: tuple[float, ...]
    trials: int = 1
    stratum: str = ""


Statistic = Callable[[Array], Array]  # sums (n, amounts) → values (n,)
Label = tuple[str, str]  # a level and a name
STATISTICS: dict[str, Statistic] = {}


def statistic(function: Statistic) -> Statistic:
    """Makes a statistic known by its name, under which samples on the disk remember it."""
    name = function.__name__.removeprefix("_")
    if name in STATISTICS:
        raise ValueError(f"statistic {name!r} is there twice")
    STATISTICS[name] = function
    return function


@statistic
def ratio(sums: Array) -> Array:
    """The first amount over the second; 0 where that is 0."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] != 0)


@statistic
def mean_ratio(sums: Array) -> Array:
    """The mean of the ratios of several parts, each with two amounts (see `in_part`)."""
    return np.mean([ratio(part) for part in np.split(sums, sums.shape[1] // 2, axis=1)], axis=0)


def in_part(unit: Unit, part: str, parts: Sequence[str]) -> Unit:
    """The same amounts in a row that holds those of all parts, the others zero: for statistics of several parts."""
    amounts = np.zeros((len(parts), len(unit.amounts)))
    amounts[parts.index(part)] = unit.amounts
    return replace(unit, amounts=tuple(amounts.ravel()))


def hit(question: Question, right: float, trials: int = 1) -> Unit:
    """`right` of `trials`, for `ratio`."""
    return Unit(question, (right, trials), trials)


def own_labels(question: Question) -> list[Label]:
    """Overall, and the question's categories."""
    named = [(OVERALL, OVERALL), (L2_CATEGORY, question.l2_category), (CATEGORY, question.category)]
    return [(level, name) for level, name in named if name]


def tabulate(
    units: Iterable[Unit],
    metric: str,
    extraction: str,
    of_sums: Statistic = ratio,
    labels: Callable[[Question], Iterable[Label]] = own_labels,
) -> list[Score]:
    """One score for each split and label: a statistic (one of `STATISTICS`) of summed units.

    For the intervals, units of one group are resampled together, within their stratum.
    """
    cells: dict[tuple[str, str, str], list[Unit]] = defaultdict(list)
    for unit in units:
        for level, name in labels(unit.question):
            cells[unit.question.split, level, name].append(unit)
    order = sorted(cells, key=lambda cell: (cell[0], LEVELS.index(cell[1]), cell[2]))
    return [_score(cells[cell], metric, extraction, cell, of_sums) for cell in order]


def overall_only(question: Question) -> list[Label]:
    """For scores that are not taken by category."""
    return [(OVERALL, OVERALL)]


def mean_of_parts(
    units: Sequence[Unit], metric: str, extraction: str, part_of: Callable[[Question], str], of_sums: Statistic
) -> list[Score]:
    """One overall score of several parts (tasks, sources), each counting alike however many questions it has.

    Args:
        units: of `hit`, or others.
        metric, extraction: as in `tabulate`.
        part_of: a question → its part; the sums of the parts lie side by side in the order of their names.
        of_sums: their statistic, such as `mean_ratio`.
    """
    parts = sorted({part_of(unit.question) for unit in units})
    spread = [replace(in_part(unit, part, parts), stratum=part) for unit in units for part in (part_of(unit.question),)]
    return tabulate(spread, metric, extraction, of_sums, overall_only)


Credit = Callable[[Question, str, str | None], float | None]  # a question, a rule and its reading → 0 … 1, or None


def credited(
    questions: Iterable[Question], parsed: Mapping[str, Mapping[str, str | None]], rule: str, credit: Credit
) -> list[Unit]:
    """What the answers are worth by one rule that read them; questions with secret answers are left out."""
    worth = ((each, credit(each, rule, parsed.get(each.id, {}).get(rule))) for each in questions)
    return [hit(question, value) for question, value in worth if value is not None]


def score_credits(
    questions: Sequence[Question],
    parsed: Mapping[str, Mapping[str, str | None]],
    metric: str,
    credit: Credit,
    labels: Callable[[Question], Iterable[Label]] = own_labels,
) -> list[Score]:
    """The mean of what answers are worth, by each rule that read them."""
    return [
        score
        for rule in extraction_rules(parsed)
        for score in tabulate(credited(questions, parsed, rule, credit), metric, rule, labels=labels)
    ]


def extraction_rules(parsed: Mapping[str, Mapping[str, str | None]]) -> list[str]:
    """The rules that read any of the answers, in their order."""
    return list(dict.fromkeys(rule for readings in parsed.values() for rule in readings))


def score_choices(
    questions: Sequence[Question], parsed: Mapping[str, str | None], extraction: str, circular: bool
) -> list[Score]:
    """Scores multiple-choice answers.

    Args:
        questions: those with a known answer are scored.
        parsed: question id → letter; a missing id or None is wrong.
        extraction: the name of the rule that parsed them.
        circular: whether the groups are rotations of one question.
    """
    groups = group_questions(question for question in questions if question.answer is not None)
    right = {question.id: parsed.get(question.id) == question.answer for group in groups for question in group}
    metrics: dict[str, list[Unit]] = {}
    if circular:
        asks_completeness = not extraction.startswith(_SCORES_ANY_ROTATIONS)
        metrics[CIRCULAR] = [
            hit(
                group[0],
                (is_complete(group) or not asks_completeness) and all(right[question.id] for question in group),
            )
            for group in groups
            if asks_completeness or group[0].rotation == 0
        ]
    metrics[VANILLA] = [
        hit(question, right[question.id]) for group in groups for question in group if question.rotation == 0
    ]
    if circular:
        metrics[EVERY_ROTATION] = [
            hit(group[0], sum(right[question.id] for question in group), len(group)) for group in groups
        ]
    return [score for metric, units in metrics.items() for score in tabulate(units, metric, extraction)]


def group_questions(questions: Iterable[Question]) -> list[list[Question]]:
    """Questions by group, rotations in order, groups in an order that does not depend on that of the questions."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.group].append(question)
    return [sorted(groups[name], key=lambda question: question.rotation) for name in sorted(groups)]


def is_complete(group: Sequence[Question]) -> bool:
    """Whether every rotation that the group is meant to have is there, counted from 0."""
    rotations = [question.rotation for question in group]
    return len(rotations) >= num_rotations(group) and rotations == list(range(len(rotations)))


def num_rotations(group: Sequence[Question]) -> int:
    """How many rotations a group is meant to have: as many as options change places in it.

    An option stays in place if all rows have its text at the same letter, and none has it at another one.
    """
    options = group[0].options
    if len(group) == 1:
        return len(options)
    rows = [question.options for question in group]
    moving = sum(
        any(row.get(letter) != text or list(row.values()).count(text) > 1 for row in rows)
        for letter, text in options.items()
    )
    return moving or len(options)


def _score(
    units: Sequence[Unit],
    metric: str,
    extraction: str,
    cell: tuple[str, str, str],
    of_sums: Statistic,
) -> Score:
    groups: dict[tuple[str, str], Array] = {}
    for unit in units:
        key = unit.stratum, unit.question.group
        groups[key] = groups.get(key, np.zeros(len(unit.amounts))) + np.asarray(unit.amounts, float)
    strata: dict[str, list[Array]] = defaultdict(list)
    for name, group in sorted(groups):  # an order that does not depend on that of the units
        strata[name].append(groups[name, group])
    total = np.sum(list(groups.values()), axis=0, keepdims=True)  # (1, amounts)
    sums = sum(resample(np.stack(of_one), SEED + number) for number, of_one in enumerate(strata.values()))
    low, high = limits(of_sums(np.asarray(sums)))
    value = float(of_sums(total)[0])
    name = next(name for name, function in STATISTICS.items() if function is of_sums)
    sample = ScoreSample(name, {key: tuple(map(float, amounts)) for key, amounts in groups.items()})
    return Score(metric, extraction, *cell, value, low, high, sum(unit.trials for unit in units), sample)
