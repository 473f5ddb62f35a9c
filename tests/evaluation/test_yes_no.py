"""Reading yes or no: each published rule with its peculiarities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.evaluation.extraction import yes_no


@pytest.mark.parametrize(
    ("answer", "strict", "llava", "mme", "vlmevalkit"),
    [
        ("Yes", "yes", "yes", "yes", "yes"),
        ("no.", "no", "no", "no", "no"),
        ("No, there is a dog.", "no", "no", "no", "no"),
        ("Yes, there is no doubt", "yes", "no", "yes", "unknown"),
        ("There is not a dog.", None, "no", "unknown", "unknown"),
        ("A dog. No cat", "no", "yes", "unknown", "no"),
        ("Nothing", None, "yes", "no", "unknown"),
        ("NO", "no", "yes", "no", "no"),  # LLaVA's script knows "No" and "no"
        ("I think, yes", "yes", "yes", "unknown", "yes"),
        ("yes/no", "yes", "yes", "yes", "unknown"),
        ("yes,perhaps of 1,000", "yes", "yes", "yes", "unknown"),  # a number's comma glues all words at commas
        ("", None, "yes", "unknown", "unknown"),
        ("maybe", None, "yes", "unknown", "unknown"),
    ],
)
def test_rules(answer: str, strict: str | None, llava: str, mme: str, vlmevalkit: str) -> None:
    assert yes_no.strict(answer) == strict
    assert yes_no.llava(answer) == llava
    assert yes_no.mme(answer) == mme
    assert yes_no.vlmevalkit(answer) == vlmevalkit


@given(st.text(max_size=30))
def test_every_answer_has_a_reading(answer: str) -> None:
    assert yes_no.strict(answer) in ("yes", "no", None)
    for rule in (yes_no.llava, yes_no.mme, yes_no.vlmevalkit):
        assert rule(answer) in ("yes", "no", "unknown")


@given(st.sampled_from(["yes", "no"]), st.text(alphabet="abc ", max_size=10))
def test_a_plain_answer_is_read_alike_by_all(word: str, rest: str) -> None:
    assert {rule(f"{word.capitalize()}, {rest}".strip()) for rule in yes_no.RULES.values()} == {word}
