"""Accuracy of multiple-choice answers: circular and vanilla, overall and by category, with intervals.

circular (CircularEval, Liu et al. 2023, MMBench, arXiv:2307.06281): a group counts as right only if every rotation of
    its options was answered right. A group that lacks a rotation cannot be right: it counts as wrong and is reported.
    (Suites that score whatever rotations a file happens to hold report a higher number then.)
vanilla: the unrotated questions alone.
every rotation: all rows, each on its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llava_npu.evaluation.bootstrap import ratio_interval
from llava_npu.evaluation.questions import Question

CIRCULAR, VANILLA, EVERY_ROTATION = "circular", "vanilla", "every rotation"
OVERALL, L2_CATEGORY, CATEGORY = LEVELS = "overall", "l2-category", "category"


@dataclass(frozen=True)
class Score:
    """One number of a report.

    Attributes:
        metric: "circular", "vanilla", …
        extraction: by which rule answers were read.
        split: the benchmark's split; "" if it has none.
        level: "overall", "l2-category" or "category"; `name` is which.
        value, low, high: in 0 … 1, with the 95 % bootstrap interval.
        count: how many units (groups, or rows for "every rotation") were scored.
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


@dataclass(frozen=True)
class _Unit:
    """What one group contributes to one metric: `hits` of `trials`."""

    question: Question  # names the group's split and categories
    hits: int
    trials: int


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
    metrics: dict[str, list[_Unit]] = {}
    if circular:
        metrics[CIRCULAR] = [
            _Unit(group[0], int(is_complete(group) and all(right[question.id] for question in group)), 1)
            for group in groups
        ]
    metrics[VANILLA] = [
        _Unit(question, int(right[question.id]), 1) for group in groups for question in group if question.rotation == 0
    ]
    if circular:
        metrics[EVERY_ROTATION] = [
            _Unit(group[0], sum(right[question.id] for question in group), len(group)) for group in groups
        ]
    return [score for metric, units in metrics.items() for score in _tables(units, metric, extraction)]


def group_questions(questions: Iterable[Question]) -> list[list[Question]]:
    """Questions by group, rotations in order, groups in an order that does not depend on that of the questions."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.group].append(question)
    return [sorted(groups[name], key=lambda question: question.rotation) for name in sorted(groups)]


def is_complete(group: Sequence[Question]) -> bool:
    """Whether each rotation of the options is there: at least as many as there are options, counted from 0."""
    rotations = [question.rotation for question in group]
    return len(rotations) >= len(group[0].options) and rotations == list(range(len(rotations)))


def _tables(units: Sequence[_Unit], metric: str, extraction: str) -> list[Score]:
    cells: dict[tuple[str, str, str], list[_Unit]] = defaultdict(list)
    for unit in units:
        question = unit.question
        for level, name in (
            (OVERALL, OVERALL),
            (L2_CATEGORY, question.l2_category),
            (CATEGORY, question.category),
        ):
            if name:
                cells[question.split, level, name].append(unit)
    order = sorted(cells, key=lambda cell: (cell[0], LEVELS.index(cell[1]), cell[2]))
    return [_score(cells[cell], metric, extraction, *cell) for cell in order]


def _score(units: Sequence[_Unit], metric: str, extraction: str, split: str, level: str, name: str) -> Score:
    hits, trials = [unit.hits for unit in units], [unit.trials for unit in units]
    low, high = ratio_interval(hits, trials)
    return Score(metric, extraction, split, level, name, sum(hits) / sum(trials), low, high, sum(trials))
