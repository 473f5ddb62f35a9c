"""Two published rules that read an option's letter very literally.

exact       `scripts/convert_seed_for_submission.py` of LLaVA: the answer is the letter and nothing else.
scienceqa   `llava/eval/eval_science_qa.py` of LLaVA: the letter alone; or at the start, before ". "; or in the only
            "The answer is X" of the answer, whatever character follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SCIENCEQA_LETTERS = "ABCDE"
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # the last dot matches any character, as in the original

EXACT_ABOUT = "LLaVA's script: the answer is exactly the letter"
SCIENCEQA_ABOUT = "LLaVA's script: the letter alone, before “. ”, or in the only “The answer is X.”"


def exact(answer: str, options: Mapping[str, str]) -> str | None:
    """The answer, if it is an option's letter."""
    return answer if answer in options else None


def scienceqa(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter by ScienceQA's rules in LLaVA, if there is such an option."""
    if answer and answer in list(_SCIENCEQA_LETTERS):
        found = answer
    elif len(answer) >= 3 and answer[0] in _SCIENCEQA_LETTERS and answer[1:3] == ". ":
        found = answer[0]
    else:
        stated = _ANSWER_IS.findall(answer)
        found = stated[0] if len(stated) == 1 else ""
    return found if found in options else None
