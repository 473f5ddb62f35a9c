"""Circular and vanilla accuracy, intervals, categories."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.statistics.accuracy import CIRCULAR, EVERY_ROTATION, VANILLA, Score, score_choices
from llava_npu.evaluation.statistics.bootstrap import ratio_interval

OPTIONS = {"A": "cat", "B": "dog", "C": "cow"}


def questions_of(groups: int, rotations: int = 3) -> list[Question]:
    return [
        Question(
            id=f"{group}.{rotation}",
            text="?",
            prompt="?",
            options=OPTIONS,
            answer="ABC"[rotation],
            group=str(group),
            rotation=rotation,
            category=f"kind {group % 2}",
        )
        for group in range(groups)
        for rotation in range(rotations)
    ]


def overall(scores: Sequence[Score], metric: str) -> Score:
    (found,) = [score for score in scores if score.metric == metric and score.level == "overall"]
    return found


def test_circular_needs_every_rotation() -> None:
    questions = questions_of(2)
    parsed: dict[str, str | None] = {question.id: question.answer for question in questions}
    parsed["1.2"] = "A"
    scores = score_choices(questions, parsed, "strict", circular=True)
    assert overall(scores, CIRCULAR).value == 0.5
    assert overall(scores, CIRCULAR).count == 2
    assert overall(scores, VANILLA).value == 1
    assert overall(scores, EVERY_ROTATION).value == pytest.approx(5 / 6)
    assert overall(scores, EVERY_ROTATION).count == 6
    by_kind = {score.name: score.value for score in scores if score.metric == CIRCULAR and score.level == "category"}
    assert by_kind == {"kind 0": 1, "kind 1": 0}


def test_group_that_lacks_a_rotation_cannot_be_right() -> None:
    questions = [question for question in questions_of(2) if question.id != "1.1"]
    parsed = {question.id: question.answer for question in questions}
    assert overall(score_choices(questions, parsed, "strict", circular=True), CIRCULAR).value == 0.5


def test_group_that_lacks_its_first_rotation_still_counts() -> None:
    questions = [question for question in questions_of(2) if question.id != "1.0"]
    scores = score_choices(questions, {question.id: question.answer for question in questions}, "strict", circular=True)
    assert (overall(scores, CIRCULAR).value, overall(scores, CIRCULAR).count) == (0.5, 2)
    assert overall(scores, VANILLA).count == 1


def test_splits_are_scored_apart_and_secret_answers_not_at_all() -> None:
    dev = [Question("1", "?", "?", options=OPTIONS, answer="A", group="1", split="dev")]
    test = [Question("2", "?", "?", options=OPTIONS, answer=None, group="2", split="test")]
    scores = score_choices([*dev, *test], {"1": "A", "2": "A"}, "strict", circular=False)
    assert [(score.split, score.value, score.count) for score in scores] == [("dev", 1.0, 1)]
    assert score_choices(test, {"2": "A"}, "strict", circular=False) == []


answers = st.lists(st.sampled_from(["A", "B", "C", None]), min_size=12, max_size=12)


@pytest.mark.slow
@given(answers)
def test_circular_is_never_above_vanilla(letters: list[str | None]) -> None:
    questions = questions_of(4)
    parsed = dict(zip([question.id for question in questions], letters, strict=True))
    scores = score_choices(questions, parsed, "strict", circular=True)
    for name in ("overall", "kind 0", "kind 1"):
        values = {score.metric: score.value for score in scores if score.name == name}
        assert values[CIRCULAR] <= values[VANILLA]
        assert values[CIRCULAR] <= values[EVERY_ROTATION]


@pytest.mark.slow
@given(answers, st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_questions(letters: list[str | None], shuffler: random.Random) -> None:
    questions = questions_of(4)
    parsed = dict(zip([question.id for question in questions], letters, strict=True))
    shuffled = list(questions)
    shuffler.shuffle(shuffled)
    assert score_choices(shuffled, parsed, "x", circular=True) == score_choices(questions, parsed, "x", circular=True)


@pytest.mark.slow
@given(answers, st.integers(0, 11))
def test_one_more_right_answer_never_lowers_a_score(letters: list[str | None], place: int) -> None:
    questions = questions_of(4)
    parsed = dict(zip([question.id for question in questions], letters, strict=True))
    better = {**parsed, questions[place].id: questions[place].answer}
    before = score_choices(questions, parsed, "x", circular=True)
    for old, new in zip(before, score_choices(questions, better, "x", circular=True), strict=True):
        assert new.value >= old.value


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_interval_holds_the_value(hits: list[bool]) -> None:
    low, high = ratio_interval(hits, [1] * len(hits))
    assert 0 <= low <= sum(hits) / len(hits) <= high <= 1


def test_interval_is_that_of_the_normal_approximation_for_many_groups() -> None:
    hits = [index < 600 for index in range(1000)]
    low, high = ratio_interval(hits, [1] * 1000)
    half = 1.96 * (0.6 * 0.4 / 1000) ** 0.5
    assert low == pytest.approx(0.6 - half, abs=0.004)
    assert high == pytest.approx(0.6 + half, abs=0.004)
    assert (low, high) == ratio_interval(hits, [1] * 1000)


def test_interval_is_wider_for_groups_than_for_as_many_rows() -> None:
    rows = ratio_interval([1, 0] * 100, [1] * 200)
    groups = ratio_interval([4, 0] * 25, [4] * 50)  # 200 rows in 50 groups that are right or wrong as a whole
    assert groups[1] - groups[0] > 1.5 * (rows[1] - rows[0])
