"""Reading yes or no. Examples of each rule are in test_extraction.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llava_npu.evaluation.extraction import yes_no


@given(st.text(max_size=30))
def test_every_answer_has_a_reading(answer: str) -> None:
    assert yes_no.strict(answer) in ("yes", "no", None)
    for rule in (yes_no.llava, yes_no.mme, yes_no.vlmevalkit):
        assert rule(answer) in ("yes", "no", "unknown")


@given(st.sampled_from(["yes", "no"]), st.text(alphabet="abc ", max_size=10))
def test_a_plain_answer_is_read_alike_by_all(word: str, rest: str) -> None:
    assert {rule(f"{word.capitalize()}, {rest}".strip()) for rule in yes_no.RULES.values()} == {word}
