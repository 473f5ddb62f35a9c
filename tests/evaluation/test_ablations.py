"""Blind and wrong-image baselines."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.data.image_sources import EmbeddedImage
from llava_npu.errors import UserError
from llava_npu.evaluation.ablations import with_images, wrong_partners
from llava_npu.evaluation.questions import Question


def questions_of(concepts: list[str], rotations: int = 2) -> list[Question]:
    return [
        Question(
            id=f"{number}.{rotation}",
            text="?",
            prompt="?",
            images=(EmbeddedImage(f"image {number}", b"", "test"),),
            options={"A": concept, "B": "else"} if rotation == 0 else {"A": "else", "B": concept},
            answer="AB"[rotation],
            group=f"{number}",
            rotation=rotation,
        )
        for number, concept in enumerate(concepts)
        for rotation in range(rotations)
    ]


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=40))
def test_partners_are_a_permutation_with_other_concepts_wherever_possible(concepts: list[str]) -> None:
    partners = wrong_partners(concepts, list(range(len(concepts))))
    assert sorted(partners) == list(range(len(concepts)))
    largest = max(Counter(concepts).values())
    unavoidable = max(0, 2 * largest - len(concepts))
    assert sum(concepts[item] == concepts[partner] for item, partner in enumerate(partners)) == unavoidable


def test_shuffled_gives_every_group_one_wrong_image() -> None:
    questions = questions_of(["dog", "cat", "dog", "cow"])
    shuffled, notes = with_images(questions, "shuffled")
    assert notes == ()
    assert [question.id for question in shuffled] == [question.id for question in questions]
    concept_of = {question.images[0].key: question.concept for question in questions}
    for before, after in zip(questions, shuffled, strict=True):
        assert concept_of[after.images[0].key] != before.concept
    for first, second in zip(shuffled[::2], shuffled[1::2], strict=True):
        assert first.images == second.images  # rotations keep one image
    assert with_images(questions, "shuffled") == (shuffled, notes)
    assert with_images(questions[::-1], "shuffled")[0] == shuffled[::-1]


def test_what_cannot_be_shuffled_is_noted() -> None:
    _, notes = with_images(questions_of(["yes", "yes", "yes", "no"]), "shuffled")
    assert notes == ("shuffled images: 2 of 4 questions got an image with the same answer.",)


def test_none_takes_the_images_away() -> None:
    blind, _ = with_images(questions_of(["dog", "cat"]), "none")
    assert all(not question.images for question in blind)


def test_given_changes_nothing() -> None:
    questions = questions_of(["dog", "cat"])
    assert with_images(questions, "given") == (tuple(questions), ())


def test_errors() -> None:
    with pytest.raises(UserError, match=r"'shufled' is unknown\. Did you mean 'shuffled'"):
        with_images([], "shufled")
    with pytest.raises(UserError, match="at least two"):
        with_images(questions_of(["dog"]), "shuffled")
