"""Answers in a few words: the VQA normaliser and the soft score over ten annotators.

The normaliser is that of the VQA challenge (Antol et al. 2015, arXiv:1505.00468) as LLaVA's evaluation has it, from
Pythia's M4C evaluator: lower case, no punctuation, no articles, number words as digits, contractions with their
apostrophe. It exists twice, because the original has faults, and both results are reported:

`normalise_as_original` is exact, faults included.
`normalise` fixes them: all periods are removed, not the first 32 (a flag is passed as the count); an answer that is
    nothing but an article, as the option letter "A.", is kept instead of vanishing; "im", "ive", "id've" get their
    apostrophe (the original's table has them in capitals, after lower-casing); "somebody'd" keeps its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}

# Each is also recognised with any one of its apostrophes left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 - a list of words reads better than a hundred quoted ones


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, character in enumerate(word) if character == "'"]


_RESTORED = {short: word for word in _CONTRACTIONS for short in _without_one_apostrophe(word)}
_RESTORED_AS_ORIGINAL = _RESTORED | {"somebody'd": "somebodyd"}
_LOWER_CASE = {"im": "i'm", "ive": "i've", "id've": "i'd've", "i'dve": "i'd've"}
_RESTORED_FIXED = _RESTORED | _LOWER_CASE | {"somebodyd": "somebody'd"}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # what the original matches; its look-behind is misspelt and always holds
_MOST_PERIODS = int(re.UNICODE)  # passed to `re.sub` where the count belongs
_VOTES_FOR_FULL_SCORE = 3


def normalise_as_original(answer: str) -> str:
    """The answer as LLaVA's TextVQA, VQAv2 and VizWiz scripts compare and submit it."""
    words = _plain(answer, _MOST_PERIODS).split()
    kept = [digit for digit in (_DIGITS.get(word, word) for word in words) if digit not in _ARTICLES]
    return " ".join(_RESTORED_AS_ORIGINAL.get(word, word) for word in kept)


def normalise(answer: str) -> str:
    """The answer in normal form, without the original's faults."""
    words = _plain(answer, 0).split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_RESTORED_FIXED.get(word, word) for word in (_DIGITS.get(word, word) for word in kept))


NORMALISERS: dict[str, Callable[[str], str]] = {"strict": normalise, "llava": normalise_as_original}


def soft_score(answer: str, references: Sequence[str]) -> float:
    """How far an answer agrees with annotators: min(1, agreeing / 3), averaged over leaving each annotator out.

    Of ten annotators: 0, 0.3, 0.6, 0.9 for none, one, two, three who agree, 1 from four on. (It takes at least four
    annotators to give a full score.)

    Args:
        answer, references: all in the same normal form.
    """
    agreeing = sum(reference == answer for reference in references)
    others = len(references) - agreeing

    def share(votes: int) -> float:
        return min(1.0, votes / _VOTES_FOR_FULL_SCORE)

    return (agreeing * share(agreeing - 1) + others * share(agreeing)) / len(references) if agreeing else 0.0


def _plain(answer: str, most_periods: int) -> str:
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in _PUNCTUATION:
        # A mark next to a space anywhere is dropped everywhere; one within words only separates them.
        plain = plain.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", plain, count=most_periods)
