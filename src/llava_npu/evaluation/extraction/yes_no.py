"""Yes-or-no questions: reading them from tables, and reading "yes" or "no" from an answer, by three published rules.

strict      ours: the first word, if it is yes or no; else the only one of the two that stands in the answer as a word.
llava       `llava/eval/eval_pope.py`: of the first sentence, "no" if a word is "No", "no" or "not"; else "yes". (So an
            answer that says neither is a yes.)
mme         MME's `eval_tool/calculation.py`: the whole answer, or "yes", or else "no", within its first four characters
            ("Nothing" is a no).
vlmevalkit  `vlmeval/dataset/utils/yorn.py`: the only one of the two that stands in the answer as a word, its
            punctuation removed as there (so "yes/maybe, yes" has no word "yes").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llava_npu.evaluation.formats.llava_files import with_instruction
from llava_npu.evaluation.formats.table_images import TableImages, table_question
from llava_npu.evaluation.formats.tables import Row, read_tsv, unique_indices
from llava_npu.evaluation.questions import Dataset, Question

YES, NO, UNKNOWN = "yes", "no", "unknown"

_WORD = re.compile(r"[^\W_]+")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_MOST_PERIODS = int(re.UNICODE)  # a flag passed as the count there; kept


def strict(answer: str) -> str | None:
    words = [word.casefold() for word in _WORD.findall(answer)]
    if words[:1] in ([YES], [NO]):
        return words[0]
    found = {YES, NO} & set(words)
    return found.pop() if len(found) == 1 else None


def llava(answer: str) -> str:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & set(words) else YES


def mme(answer: str) -> str:
    answer = answer.lower()
    if answer in (YES, NO):
        return answer
    start = answer[:4]
    return YES if YES in start else NO if NO in start else UNKNOWN


def vlmevalkit(answer: str) -> str:
    text = answer.lower()
    drops_all = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _MARKS:
        plain = plain.replace(mark, "" if drops_all or f"{mark} " in text or f" {mark}" in text else " ")
    words = _PERIOD.sub("", plain, count=_MOST_PERIODS).split()
    return YES if YES in words and NO not in words else NO if NO in words and YES not in words else UNKNOWN


RULES: dict[str, Callable[[str], str | None]] = {
    "strict": strict,
    "llava": llava,
    "mme": mme,
    "vlmevalkit": vlmevalkit,
}
_ABOUT = {
    "strict": "ours: the first word, else the only “yes” or “no” in the answer",
    "llava": "LLaVA's script: a “no” or “not” in the first sentence, else yes",
    "mme": "MME's tool: “yes” or “no” within the first four characters",
    "vlmevalkit": "VLMEvalKit: the only “yes” or “no” in the answer, punctuation removed as there",
}


def about(*rules: str) -> dict[str, str]:
    """What these rules are, as `Benchmark.rules` wants it."""
    return {rule: _ABOUT[rule] for rule in rules}


def parse_by(*rules: str) -> Callable[[Question, str], dict[str, str | None]]:
    """What each of these rules reads from an answer, as `Benchmark.parse` wants it."""
    return lambda question, answer: {rule: RULES[rule](answer) for rule in rules}


def read_yes_no_table(path: Path, question: Callable[[Row, Question], Question], instruction: str | None) -> Dataset:
    """Reads a table of VLMEvalKit: index, question, answer (Yes or No), image, category and more.

    Args:
        path: the .tsv file.
        question: completes a question from its row (group, facts).
        instruction: the prompt's last line, if any.

    Raises:
        UserError: anything wrong with the file, naming row and column.
    """
    table = read_tsv(path, required=("index", "question", "answer"))
    images = TableImages(table)
    unique_indices(table)
    questions = []
    for row in table.rows:
        basis = table_question(row, images, answer=_truth(row), split="")
        if instruction is not None:
            basis = replace(basis, prompt=with_instruction(basis.text, instruction))
        questions.append(question(row, basis))
    return Dataset(path, table.sha256, tuple(questions))


def _truth(row: Row) -> str | None:
    answer = row.label("answer").lower()
    if answer not in (YES, NO, ""):
        raise row.error("answer", f"{answer[:60]!r} is neither Yes nor No.")
    return answer or None
