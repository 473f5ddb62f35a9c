"""The option's letter in an answer by the rules of two groups of lmms-eval's tasks, and of Cambrian-1's scripts.

References: EvolvingLMMs-Lab/lmms-eval at 75571cf (lmms_eval/tasks/_task_utils/mcq_extract.py; cv_bench/utils.py and
blink/utils.py), cambrian-mllm/cambrian at 539ffc3 (eval/eval/ade/ade_test.py, eval/eval/realworldqa/
realworldqa_test.py). Faults included: "The answer is B" begins with the letter T, "DNA is" has an "A" before a space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FIRST_LETTER_ABOUT = "lmms-eval's task: the letter that the answer begins with, be it a word's"
RANKED_ABOUT = "lmms-eval's task: the letter at the start, else at the end, else after “answer is”, in brackets, …"
CAMBRIAN_ABOUT = "Cambrian-1's scripts: what follows the last “answer is” or “answer:”"

_FIRST_LETTER = re.compile(r"[(\s]*([A-Z])", re.IGNORECASE)
_STRIPPED = ",.!?;:'\""
_KINDS = ("{}", "the {}", "correct {}", "the correct {}")
_STATEMENTS = (
    *(f"{kind.format('answer')} is" for kind in (*_KINDS, "best {}", "the best {}", "my {}")),
    *(f"{kind.format('option')} is" for kind in ("correct {}", "the correct {}", "best {}", "the best {}")),
    *(f"{kind.format('choice')} is" for kind in (*_KINDS, "my {}")),
    *(f"i {verb}" for verb in ("choose", "select", "pick")),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_CAMBRIAN_STATEMENTS = ("answer is", "answer is:", "answer:")


def first_letter(answer: str) -> str | None:
    """The letter that begins the answer, after brackets and spaces."""
    match = _FIRST_LETTER.match(answer.strip())
    return match[1].upper() if match else None


def ranked_letter(answer: str, letters: Sequence[str]) -> str | None:
    """The letter in the most trusted place; of several in such places, the last."""
    text = answer.strip()
    for mark in _STRIPPED:
        text = text.strip(mark)
    text = f" {text} "
    found = [*_in_forms(text, letters), *_stated(text, letters), *_at_ends(text, letters)]
    if not answer.strip():
        return None
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    # The first of equals, as a stable sort has it.
    return max(found, key=lambda each: each[:2])[2] if found else None


def cambrian_statement(answer: str) -> str:
    """What follows the last statement of an answer, in lower case, without a period behind."""
    text = answer.lower().strip()
    for statement in _CAMBRIAN_STATEMENTS:
        text = text.split(statement)[-1]
    return text.strip().rstrip(".")


def cambrian_letter(answer: str) -> str | None:
    """The first letter of that statement, brackets aside."""
    return cambrian_statement(answer).lstrip("(").rstrip(")")[:1].upper() or None


def _in_forms(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    forms = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
    return [
        (trust, text.rfind(form.format(letter)), letter)
        for form, trust in forms.items()
        for letter in letters
        if form.format(letter) in text
    ]


def _stated(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    found = []
    for statement in _STATEMENTS:
        place = text.lower().find(statement)
        if place >= 0:
            places = [(text.find(letter, place + len(statement)), letter) for letter in letters]
            found += [(7, where, letter) for where, letter in places if where >= 0]
    return found


def _at_ends(text: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    bare = text.strip()
    found = []
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
    return found
