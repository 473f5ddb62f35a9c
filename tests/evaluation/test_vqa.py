"""The VQA normaliser and soft score. Reference: golden/misc.json, computed with LLaVA's llava/eval/m4c_evaluator.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.evaluation.extraction.vqa import normalise, normalise_as_original, soft_score

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "misc.json").read_text(encoding="utf-8"))
answers = st.text(alphabet="abtheno's ATI.,?!-/\n 0123", max_size=40)


@pytest.mark.parametrize(("answer", "expected"), GOLDEN["m4c"].items())
def test_original_normaliser(answer: str, expected: str) -> None:
    assert normalise_as_original(answer) == expected


def test_soft_score_by_votes() -> None:
    scores = [soft_score("yes", ["yes"] * votes + ["no"] * (10 - votes)) for votes in range(11)]
    assert scores == pytest.approx(GOLDEN["textvqa_acc_by_votes"])


@pytest.mark.parametrize(
    ("answer", "original", "mended"),
    [
        ("A.", "", "a"),  # an option's letter
        ("The", "", "the"),
        ("the cat", "cat", "cat"),
        ("x" + ". " * 40, "x" + " ." * 8, "x"),  # 32 periods go, 40 are there
        ("Im here", "im here", "i'm here"),
        ("somebody'd", "somebodyd", "somebody'd"),
        ("yall'd've", "y'all'd've", "y'all'd've"),
        ("couldnt've", "couldn't've", "couldn't've"),
    ],
)
def test_what_is_mended(answer: str, original: str, mended: str) -> None:
    assert normalise_as_original(answer).split() == original.split()
    assert normalise(answer) == mended


@given(answers)
def test_normal_form_is_lower_case_and_single_spaced(answer: str) -> None:
    for form in (normalise(answer), normalise_as_original(answer)):
        assert form == form.lower() == " ".join(form.split())
        assert not set(form) & set(',?!/"')


@given(st.lists(answers, min_size=10, max_size=10), answers, st.randoms())
def test_soft_score_is_the_mean_over_leaving_one_out(references: list[str], answer: str, random: object) -> None:
    by_definition = [
        min(1.0, sum(other == answer for other in references[:left] + references[left + 1 :]) / 3)
        for left in range(len(references))
    ]
    assert soft_score(answer, references) == pytest.approx(sum(by_definition) / len(references))
    shuffled = list(references)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert soft_score(answer, shuffled) == soft_score(answer, references)
    assert soft_score(answer, [*references[:-1], answer]) >= soft_score(answer, [*references[:-1], answer + "x"])
