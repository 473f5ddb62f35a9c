"""MMMU: questions of college level with several images (Yue et al. 2023, arXiv:2311.16502), development and
validation split.

A few questions are open, some with several right answers. The rule `strict` asks for the text of one of them in normal
form; `vlmevalkit` reads the answer, as VLMEvalKit does, as a choice between the right answer and "Other Answers";
`mmmu` is the authors' own (MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py), but where they draw an option at random for
an answer that they cannot read, it is wrong here and counted in a note.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, Description, Parsed, register
from llava_npu.evaluation.extraction.choices import (
    ABOUT,
    ENGLISH,
    ChoiceBenchmark,
    ChoiceForm,
    parse_choice,
    read_choices,
    review_vanilla,
)
from llava_npu.evaluation.extraction.rules import extract_vlmevalkit
from llava_npu.evaluation.extraction.vqa import normalise
from llava_npu.evaluation.questions import Dataset, Question

_ABOUT_MMMU = (
    "the authors': the last letter in brackets or between spaces, or option's text; open: text or number occurs"
)
_RULES = {**ABOUT, "mmmu": _ABOUT_MMMU}
_OPEN = "Answer the question directly."


_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_FEW_WORDS = 5  # an answer of no more is not searched for the options' texts


def _read(path: Path) -> Dataset:
    form = ChoiceForm(open_instruction=_OPEN, facts=lambda row: {"answer": row.label("answer")})
    return read_choices(path, form).map(_with_references)


def _with_references(question: Question) -> Question:
    """An open question with several right answers has them as a list in the table: ['24/7', '3.429']."""
    answer = question.facts["answer"]
    if question.options or question.answer is None or not answer.startswith("["):
        return question
    try:
        listed = ast.literal_eval(answer)
    except (SyntaxError, ValueError):
        return question  # a text that begins so
    if not isinstance(listed, list) or not listed:
        return question
    references = tuple(map(str, listed))
    return replace(question, references=references, answer=references[0])


def _parse(question: Question, answer: str) -> Parsed:
    if question.options:
        return {**parse_choice(question, answer), "mmmu": read_choice(answer, question.options)}
    if question.answer is None:
        return dict.fromkeys(_RULES)
    truths = question.references or (question.answer,)
    equal = bool(normalise(answer)) and normalise(answer) in map(normalise, truths)
    matched = extract_vlmevalkit(answer, {"A": question.facts["answer"], "B": "Other Answers"}) == "A"
    right = {"strict": equal, "vlmevalkit": matched, "mmmu": is_right(answer, truths)}
    return {rule: question.answer if right[rule] else None for rule in _RULES}


def read_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter by MMMU's rules, the last of several; None where they would draw one."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in options}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) > _FEW_WORDS:
        places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    return None


def is_right(answer: str, truths: Sequence[str]) -> bool:
    """Whether an open answer is right by the rules of MMMU: a key phrase holds a true text, or a number is equal."""
    expected = [form for truth in truths for form in _forms(truth)]
    phrases = _key_phrases(answer)
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    for form in (form for part in (*phrases, *numbers) for form in _forms(part)):
        if isinstance(form, str):
            if any(isinstance(truth, str) and truth in form for truth in expected):
                return True
        elif form in expected:
            return True
    return False


def _key_phrases(answer: str) -> list[str]:
    """What follows "is", "so", "answer", … in each sentence, the shortest of each; all if nothing does."""
    whole = answer.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", whole)
    phrases = []
    for number, sentence in enumerate(sentences, start=1):
        keys = (*_KEYS, "=") if number == len(sentences) else _KEYS
        tails = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        shortest = _shortest(tails)
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    return phrases or [whole]


def _shortest(tails: Sequence[str]) -> str:
    # As the original: an empty tail is taken only if it comes after a longer one, and then replaced by the next.
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def _forms(text: str) -> list[str | float]:
    """A number to two decimals; a text in lower case; a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _review(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    notes = review_vanilla(questions, parsed)
    unread = [
        question.id
        for question in questions
        if question.options and question.answer and parsed.get(question.id, {}).get("mmmu") is None
    ]
    if unread:
        notes.append(
            f"{len(unread)} choices cannot be read by the rule mmmu (first: {unread[0]}) and count as wrong; the "
            "authors' script draws an option at random for them."
        )
    return notes


register(
    ChoiceBenchmark(
        name="mmmu",
        title="MMMU (val)",
        description=Description(
            source="https://mmmu-benchmark.github.io (VLMEvalKit: MMMU_DEV_VAL.tsv)",
            form="MMMU_DEV_VAL.tsv: index, question, A …, answer, category, l2-category, split (dev or validation), "
            "image (base64, or a list of several); without options where the question is open",
            licence="Apache-2.0",
            prompt="all images, then the question as it is (“<image 1>” stays as text), one option a line, "
            f"“{ENGLISH}”; open questions: “{_OPEN}”",
            metric="accuracy by split, discipline and subject",
            scored=(LOCALLY,),
        ),
        files=("MMMU_DEV_VAL.tsv", "MMMU_VAL.tsv"),
        read=_read,
        parse=_parse,
        review=_review,
        max_new_tokens=1024,
        rules=_RULES,
        checksums={"MMMU_DEV_VAL.tsv": "585e8ad75e73f75dcad265dfd0417d64"},
    )
)
