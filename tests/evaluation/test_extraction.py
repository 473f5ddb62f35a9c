"""Reading options from answers.

Reference of the `vlmevalkit` cases: open-compass/VLMEvalKit, vlmeval/utils/matching_util.py (`can_infer`), run on these
answers; faults included.
"""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.evaluation.extraction.rules import EXTRACTORS, extract_strict, extract_vlmevalkit

ANIMALS = {"A": "cat", "B": "dog", "C": "hot dog", "D": "a red car"}


@pytest.mark.parametrize(
    ("answer", "strict", "vlmevalkit"),
    [
        ("B", "B", "B"),
        (" B\n", "B", "B"),
        ("b", "B", None),
        ("(B)", "B", "B"),
        ("**B**.", "B", "B"),
        ("B.", "B", "B"),
        ("B. dog", "B", "B"),
        ("B: dog", "B", "B"),
        ("B\nBecause it barks.", "B", "B"),
        ("B. cat", None, "B"),  # letter and text disagree
        ("Answer: B", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("The answer is **B**, because it barks loudly at night and wags its tail", "B", "B"),
        ("The correct option is (B)", "B", "B"),
        ("The answer is dog", "B", "D"),  # their pattern reads the D of "dog"
        ("The answer is a dog", "B", "A"),  # and the article
        ("A dog is here", "B", "A"),
        ("A hot dog", "C", "A"),  # "dog" in "hot dog" is no mention of a dog
        ("It is a hot dog", "C", None),  # two texts occur
        ("I see a cat", "A", "A"),
        ("a red car", "D", "D"),
        ("the dog and the cat", None, None),
        ("B or C", None, None),
        ("The answer is B. No, the answer is C.", None, "B"),
        ("catalogue", None, "A"),  # a text inside a word
        ("E", None, None),
        ("Z", None, "Z"),
        ("I can't process this file.", None, "Z"),
        ("Sorry, I can't help with images of people yet.", None, "Z"),
        ("Failed to obtain answer via API", None, None),
        ("", None, None),
        ("答案是B", "B", None),
        ("答案：B。", "B", None),
        ("选B吧", "B", None),
        ("neither of them", None, None),
        (
            "It's B that I would choose, because of the long ears and the tail",
            "B",
            None,
        ),  # not within 4 tokens of the end
    ],
)
def test_answers(answer: str, strict: str | None, vlmevalkit: str | None) -> None:
    assert extract_strict(answer, ANIMALS) == strict
    assert extract_vlmevalkit(answer, ANIMALS) == vlmevalkit


def test_text_counts_only_in_answers_at_most_twice_as_long_as_all_options_for_vlmevalkit() -> None:
    limit = 2 * sum(map(len, ANIMALS.values()))
    assert extract_vlmevalkit("dog".ljust(limit, "-"), ANIMALS) == "B"
    assert extract_vlmevalkit("dog".ljust(limit + 1, "-"), ANIMALS) is None


def test_more_options_than_four_by_their_patterns_limit() -> None:
    six = dict(zip("ABCDEF", ["one", "two", "three", "four", "five", "six"], strict=True))
    assert extract_strict("The answer is E, of course, and I am quite sure", six) == "E"
    assert extract_vlmevalkit("The answer is E, of course, and I am quite sure", six) is None  # only A–D in the pattern


def test_option_i_is_not_the_pronoun() -> None:
    nine = {letter: f"thing {number}" for number, letter in enumerate("ABCDEFGHI")}
    assert extract_strict("I think it is C.", nine) == "C"
    assert extract_strict("It must be I.", nine) == "I"


def test_chinese_option_text_needs_no_word_boundary() -> None:
    assert extract_strict("这是一只狗。", {"A": "猫", "B": "狗"}) == "B"


@given(st.sampled_from(sorted(ANIMALS)), st.sampled_from(["{}", "({})", "{}.", " {}\n", "{})", "[{}]", "Answer: {}"]))
def test_both_rules_read_a_plain_letter(letter: str, form: str) -> None:
    answer = form.format(letter)
    assert extract_strict(answer, ANIMALS) == extract_vlmevalkit(answer, ANIMALS) == letter


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=6))
def test_any_text_gives_a_known_letter_or_nothing(answer: str, texts: list[str]) -> None:
    options = dict(zip(string.ascii_uppercase, texts, strict=False))
    for name, extract in EXTRACTORS.items():
        assert extract(answer, options) in {None, *options, *({"Z"} if name == "vlmevalkit" else ())}


XY = {"A": "x", "B": "y"}
COMBINED = {**XY, "C": "Both A and B", "D": "None"}


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("A: x\nB: y\nAnswer: B", XY, "B"),  # repeats the options, then answers
        ("A. x\nB. y\nThe answer is B.", XY, "B"),
        ("A. x\nB. y\nB", XY, "B"),
        ("A. x B. y", XY, None),  # … and does not answer
        ("Both A and B", COMBINED, "C"),
        ("A and B", COMBINED, "C"),
        ("A and B", XY, None),
        ("A or B", XY, None),
        ("A, B", XY, None),
        ("A, or maybe B", XY, None),
        ("The answer is A, B", XY, None),
        ("It is not A but B", XY, "B"),
        ("It isn't A.", XY, None),
        ("A. Because B is wrong", XY, "A"),
        ("B. y, not A", XY, "B"),
        ("（Ｂ）", XY, "B"),
        ("答案是Ｂ。", XY, "B"),
    ],
)
def test_repeated_hedged_and_full_width_answers(answer: str, options: dict[str, str], expected: str | None) -> None:
    assert extract_strict(answer, options) == expected
