"""The judge's part in multiple choice: which option an answer means, where no rule can tell.

As VLMEvalKit does it, a judge sees only the answers that exact matching cannot read; unlike there, an answer that the
judge cannot read either is wrong, not a random option. The instruction is in our own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llava_npu.evaluation.extraction import choices
from llava_npu.evaluation.extraction.choices import ChoiceBenchmark
from llava_npu.evaluation.extraction.rules import REFUSED, extract_strict
from llava_npu.evaluation.judge.judging import JudgeRule
from llava_npu.evaluation.questions import Question

RULE = "vlmevalkit+judge"
ABOUT = "VLMEvalKit's rules, and a judge model for answers that they cannot read (if a judge is given)"

_INSTRUCTION = """\
A question with options was put to a model, which answered in its own words. Which option does the answer mean?
Reply with that option's letter alone, or with {refused} if the answer means none of them or more than one.
Do not answer the question yourself.

Question: {question}
{options}
Answer: {answer}
Letter:"""


def _ask(question: Question, answer: str) -> str | None:
    if not answer.strip():
        return None
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    return _INSTRUCTION.format(refused=REFUSED, question=question.text, options=options, answer=answer)


def _read(question: Question, reply: str) -> str | None:
    return extract_strict(reply, {**question.options, REFUSED: "none of them"})


CHOICE_JUDGE = JudgeRule(rule=RULE, required=False, ask=_ask, read=_read, base="vlmevalkit", max_tokens=16)


@dataclass(frozen=True)
class JudgedChoiceBenchmark(ChoiceBenchmark):
    """A benchmark of multiple-choice questions whose answers a judge may read where no rule can."""

    rules: Mapping[str, str] = field(default_factory=lambda: {**choices.ABOUT, RULE: ABOUT})
    judging: JudgeRule | None = CHOICE_JUDGE
