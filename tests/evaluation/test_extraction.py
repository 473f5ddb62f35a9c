"""Reading options from answers.

The examples are those of docs/evaluation.md (src/llava_npu/evaluation/extraction/examples.json). Their `vlmevalkit`
readings are those of open-compass/VLMEvalKit, vlmeval/utils/matching_util.py (`can_infer`), run on these answers; the
other published rules are compared with the official code by benchmarks/official_scorers.py.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.evaluation.extraction import lmms_eval, yes_no
from llava_npu.evaluation.extraction.rules import EXTRACTORS, extract_strict, extract_vlmevalkit, scienceqa
from llava_npu.evaluation.reports.reference import Example, extraction_examples


def option(letter: str | None, options: Mapping[str, str]) -> str | None:
    return letter if letter in options else None


RULES: dict[str, Callable[[str, Mapping[str, str]], str | None]] = {
    "strict": extract_strict,
    "vlmevalkit": extract_vlmevalkit,
    "scienceqa": scienceqa,
    "ranked": lambda answer, options: lmms_eval.ranked_letter(answer, list(options)),
    "first": lambda answer, options: option(lmms_eval.first_letter(answer), options),
    "cambrian": lambda answer, options: option(lmms_eval.cambrian_letter(answer), options),
}
CHOICES, YES_OR_NO = extraction_examples()


@pytest.mark.parametrize("example", CHOICES.answers, ids=lambda example: example.answer)
def test_examples_of_choices(example: Example) -> None:
    """What docs/evaluation.md shows."""
    found = {rule: RULES[rule](example.answer, CHOICES.options) for rule in CHOICES.rules}
    assert found == example.readings


@pytest.mark.parametrize("example", YES_OR_NO.answers, ids=lambda example: example.answer)
def test_examples_of_yes_and_no(example: Example) -> None:
    assert {rule: yes_no.RULES[rule](example.answer) for rule in YES_OR_NO.rules} == example.readings


def test_text_counts_only_in_answers_at_most_twice_as_long_as_all_options_for_vlmevalkit() -> None:
    limit = 2 * sum(map(len, CHOICES.options.values()))
    assert extract_vlmevalkit("dog".ljust(limit, "-"), CHOICES.options) == "B"
    assert extract_vlmevalkit("dog".ljust(limit + 1, "-"), CHOICES.options) is None


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


@given(
    st.sampled_from(sorted(CHOICES.options)),
    st.sampled_from(["{}", "({})", "{}.", " {}\n", "{})", "[{}]", "Answer: {}"]),
)
def test_both_rules_read_a_plain_letter(letter: str, form: str) -> None:
    answer = form.format(letter)
    assert extract_strict(answer, CHOICES.options) == extract_vlmevalkit(answer, CHOICES.options) == letter


@pytest.mark.slow
@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=6))
def test_any_text_gives_a_known_letter_or_nothing(answer: str, texts: list[str]) -> None:
    options = dict(zip(string.ascii_uppercase, texts, strict=False))
    for name, extract in EXTRACTORS.items():
        assert extract(answer, options) in {None, *options, *({"Z"} if name == "vlmevalkit" else ())}


XY = {"A": "x", "B": "y"}
COMBINED = {**XY, "C": "Both A and B", "D": "None"}
BOTH = {**XY, "C": "Both A and B", "D": "Neither A nor B", "E": "A or B"}
LETTERS = {"A": "B", "B": "A", "C": "H"}
NUMBERS = {"A": "2", "B": "3", "C": "-1", "D": "1"}
YES_NO = {"A": "Yes", "B": "No"}


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("A: x\nB: y\nAnswer: B", XY, "B"),  # repeats the options, then answers
        ("A. x\nB. y\nThe answer is B.", XY, "B"),
        ("A. x\nB. y\nB", XY, "B"),
        ("A. x B. y", XY, None),  # … and does not answer
        ("Both A and B", COMBINED, "C"),
        ("A and B", COMBINED, "C"),
        ("A and B", BOTH, "C"),  # where others join them too
        ("Both A & B", BOTH, "C"),
        ("The answer is both A and B.", BOTH, "C"),
        ("A and B are correct", BOTH, "C"),
        ("It is neither A nor B", BOTH, "D"),
        ("I think it is A or B", COMBINED, None),
        ("A, or maybe B", COMBINED, None),
        ("A: x, no.\nB: y, yes.\nSo the answer is B.", XY, "B"),  # goes through the options
        ("A: x, no.\nB: y, yes.", XY, None),
        ("A. x\nB. y\n\nB. y", XY, "B"),
        ("A", LETTERS, "A"),  # a letter was asked for
        ("B. A", LETTERS, "B"),
        ("It is 2.5", NUMBERS, None),
        ("It is -1", NUMBERS, "C"),
        ("It is 3.", NUMBERS, "B"),
        ("Yes, there is no doubt", YES_NO, "A"),
        ("It is not a dog", {"A": "dog", "B": "cat"}, None),
        ("It is not a dog but a cat", {"A": "dog", "B": "cat"}, "B"),
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
        ("The best option is (ｂ)", XY, "B"),
        ("Option A is wrong, option B is correct.", XY, "B"),
        ("The correct answer to this question is b.", XY, "B"),
        ("The answer is B because A is a z", XY, "B"),
        ("The answer is i.e. unclear", {**XY, "I": "z"}, None),
        ("the answer is a cat", {"A": "dog", "B": "cow"}, None),
        ("The wrong option is B.", XY, None),
        ("The answer cannot be option (b).", XY, None),
        ("The correct answer is neither A nor B.", XY, None),
        ("Is the answer a? No, the answer is b.", XY, None),
        ("The answer is a or b.", XY, None),
        ("The correct option is b. It could also be a.", XY, None),
        ("(a) is correct, (b) is correct", XY, None),
    ],
)
def test_repeated_hedged_and_full_width_answers(answer: str, options: dict[str, str], expected: str | None) -> None:
    assert extract_strict(answer, options) == expected
