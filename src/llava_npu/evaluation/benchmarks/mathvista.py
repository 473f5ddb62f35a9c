"""MathVista: mathematics in images (Lu et al. 2023, arXiv:2310.02255), the split testmini.

The authors (lupantech/MathVista at 53d5258, evaluation/extract_answer.py and calculate_score.py) read what is a bare
choice or number, or stands in 'The answer is "…".', by rules, and have a GPT model extract the rest; the result is
then compared. The rule `mathvista` is what needs no model: the rest is wrong and counted in a note, or put to a judge.
`vlmevalkit` is its counterpart without a model (open-compass/VLMEvalKit at e8e78f0,
vlmeval/dataset/utils/mathvista.py).
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction.rules import extract_strict, extract_vlmevalkit
from llava_npu.evaluation.extraction.similarity import edit_distance
from llava_npu.evaluation.formats.json_files import JsonRecord, read_json_table
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.formats.parquet import read_parquet, record_image
from llava_npu.evaluation.judge.judging import JudgeRule
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import CATEGORY, Label, own_labels, score_credits

_JUDGED = "mathvista+judge"
_RULES = {
    "strict": "ours: the option that the answer names; the only number in it, or the one after “answer is”",
    "mathvista": "the authors' rules for bare choices and numbers and 'The answer is \"…\".'",
    "vlmevalkit": "VLMEvalKit's rules before it asks a model",
    _JUDGED: "the authors' rules, and a judge model extracts the rest (if a judge is given)",
}
_TYPES = ("text", "integer", "float", "list")
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?![\w])")
_STATED = re.compile(r"answer\s*(?:is|:|=)\s*", re.IGNORECASE)

_INSTRUCTION = """\
A question was put to a model, which answered at length. What is its final answer? Do not solve the question yourself.
Reply with that answer alone, in the form that the question asks for: an option's letter, a number, or a Python list.

Question: {question}

Answer: {answer}

Final answer:"""


def _read(path: Path) -> Dataset:
    if path.suffix == ".json":
        records, digest = read_json_table(path)
        folder = QuestionImages(path, ("..", "."))
        # The authors' file has pid as key, and "images/1.jpg".
        each = [_question(record, folder.image(record), name) for name, record in records.items()]
        return Dataset(path, digest, tuple(each))
    rows, digest = read_parquet(path)
    return Dataset(path, digest, tuple(_question(row, record_image(row, "decoded_image"), "") for row in rows))


def _question(record: JsonRecord, image: ImageSource, name: str) -> Question:
    choices = record.texts("choices")
    kind = record.need("answer_type")
    if kind not in _TYPES:
        raise record.error("answer_type", f"{kind!r}: {', '.join(_TYPES)} are known.")
    if len(choices) > len(string.ascii_uppercase):
        raise record.error("choices", f"{len(choices)} choices; at most 26 are expected.")
    answer = record.get("answer") or None
    if choices and answer is not None and answer not in choices:
        raise record.error("answer", f"{answer[:60]!r} is none of the choices ({', '.join(choices)}).")
    about = record.values.get("metadata")
    labels = JsonRecord(about if isinstance(about, dict) else {}, record.file, record.place)
    options = record.options("choices")
    field = "query" if record.get("query") else "question"
    return Question(
        id=record.get("pid") or name,
        text=record.need("question"),
        prompt=record.need(field),
        images=(image,),
        options=options,
        answer=next(letter for letter, text in options.items() if text == answer) if options and answer else answer,
        group=record.get("pid") or name,
        category=labels.get("task"),
        l2_category=labels.get("category"),
        facts={
            "type": kind,
            "precision": _precision(record),
            "skills": "\n".join(labels.texts("skills")),
        },
    )


def _precision(record: JsonRecord) -> str:
    precision = record.get("precision") or "0"
    if not precision.replace(".0", "").isdecimal():
        raise record.error("precision", f"{precision[:60]!r} is not a number of decimals.")
    return precision


def _parse(question: Question, answer: str) -> Parsed:
    extracted = extract(question, answer)
    return {
        "strict": _strict(question, answer),
        "mathvista": None if extracted is None else normalise(question, extracted),
        "vlmevalkit": _vlmevalkit(question, answer),
    }


def extract(question: Question, answer: str) -> str | None:
    """The authors' extraction as far as it needs no model; None where it needs one."""
    if answer == "" or answer in question.options.values():
        return answer
    for kind, form in (("integer", int), ("float", float)):
        if question.facts["type"] == kind:
            try:
                return str(form(answer))
            except ValueError:
                pass
    match = _QUOTED.search(answer)
    return match[1] if match else None


def normalise(question: Question, extracted: str) -> str | None:
    """What is compared with the truth: an option's letter, a number as the truth is written, or the text."""
    kind = question.facts["type"]
    try:
        if question.options:
            return _option(extracted.strip(), question.options)
        if kind == "integer":
            return str(int(float(extracted)))
        if kind == "float":
            return str(round(float(extracted), int(float(question.facts["precision"]))))
    except (ValueError, OverflowError):
        return None
    return extracted


def _option(extracted: str, options: Mapping[str, str]) -> str:
    """A letter, or the option whose text is closest to what was extracted: there always is one."""
    bracketed = _BRACKETED.search(extracted)
    letter = bracketed[1].upper() if bracketed else extracted
    if letter in options:
        return letter
    # "(Z)" is not an option: then its letter is what is compared with the texts, as in the original.
    return min(options, key=lambda each: edit_distance(letter, options[each]))


def _strict(question: Question, answer: str) -> str | None:
    if question.options:
        return extract_strict(answer, question.options)
    if question.facts["type"] == "list":
        return _list(answer)
    stated = _STATED.split(answer)
    for text in (stated[-1], answer) if len(stated) > 1 else (answer,):
        numbers = {float(number.replace(",", "")) for number in _NUMBER.findall(text) if number.strip("+-")}
        if len(numbers) == 1:
            return normalise(question, repr(numbers.pop()))
    return None


def _list(answer: str) -> str | None:
    start, end = answer.find("["), answer.rfind("]")
    try:
        value = ast.literal_eval(answer[start : end + 1]) if 0 <= start < end else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return str(value) if isinstance(value, list) else None


def _vlmevalkit(question: Question, answer: str) -> str | None:
    if question.options:
        return extract_vlmevalkit(answer, question.options)
    kind = question.facts["type"]
    try:
        return str({"integer": int, "float": float}[kind](answer))
    except (KeyError, ValueError):
        return None


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    if question.answer is None:
        return None
    if reading is None:
        return 0.0
    if question.options:  # two options may have one text
        return float(question.options.get(reading) == question.options[question.answer])
    if rule == "vlmevalkit":
        try:
            return float(float(reading) == float(question.answer))
        except ValueError:  # the truth is not a number
            return 0.0
    return float(reading == question.answer)


def _labels(question: Question) -> list[Label]:
    return [*own_labels(question), *((CATEGORY, skill) for skill in question.facts["skills"].split("\n") if skill)]


def _review(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    unread = [each for each in questions if parsed.get(each.id, {}).get("mathvista") is None]
    if not unread or any(_JUDGED in readings for readings in parsed.values()):
        return []
    return [
        f"{len(unread)} answers cannot be read by the authors' rules (first: {unread[0].id}) and count as wrong in "
        "`mathvista`; they have a GPT model extract them. Give a judge (--judge-url, --judge-model) for that."
    ]


def _ask(question: Question, answer: str) -> str | None:
    return _INSTRUCTION.format(question=question.prompt, answer=answer) if answer.strip() else None


def _judged(question: Question, reply: str) -> str | None:
    return normalise(question, reply.strip()) if reply.strip() else None


register(
    Benchmark(
        name="mathvista",
        title="MathVista (testmini)",
        description=Description(
            source="https://mathvista.github.io; Hugging Face: AI4Math/MathVista",
            form="testmini-….parquet (pid, question, query, decoded_image, choices, answer, question_type, "
            "answer_type, precision, metadata); or data/testmini.json (pid → the same) with images/",
            licence="CC BY-SA 4.0; images of 31 data sets under their own terms",
            prompt="the file's query (hint, question, choices); of testmini.json the question",
            metric="accuracy by task, skill and category",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=(
            *(f"{folder}data/testmini-00000-of-*.parquet" for folder in ("MathVista/", "mathvista/", "")),
            *(f"{folder}data/testmini.json" for folder in ("MathVista/", "mathvista/", "")),
        ),
        read=_read,
        parse=_parse,
        score=partial(score_credits, metric="accuracy", credit=_credit, labels=_labels),
        credit=_credit,
        review=_review,
        max_new_tokens=1024,
        rules=_RULES,
        judging=JudgeRule(rule=_JUDGED, required=False, ask=_ask, read=_judged, base="mathvista", max_tokens=64),
    )
)
