"""RealWorldQA: photographs, many of them from cars (xAI 2024). xAI published no scorer.

`lmms-eval` and `cambrian` are what two suites compute (see `extraction.lmms_eval`; EvolvingLMMs-Lab/lmms-eval at
75571cf, lmms_eval/tasks/realworldqa/utils.py). VLMEvalKit asks all questions with options, from a table of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, Description, Parsed, register
from llava_npu.evaluation.extraction import lmms_eval
from llava_npu.evaluation.extraction.choices import (
    ABOUT,
    ENGLISH,
    ChoiceBenchmark,
    ChoiceForm,
    parse_choice,
    read_choices,
)
from llava_npu.evaluation.extraction.rules import extract_vlmevalkit
from llava_npu.evaluation.extraction.vqa import normalise
from llava_npu.evaluation.formats.json_files import JsonRecord
from llava_npu.evaluation.formats.parquet import read_parquet, record_image
from llava_npu.evaluation.questions import Dataset, Question

_OPTION = re.compile(r"^([A-Z])\.\s+(.*?)\s*$", re.MULTILINE)
_LETTERS = "ABCD"


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return read_choices(path, ChoiceForm(skips_empty_options=True))
    records, digest = read_parquet(path)
    return Dataset(path, digest, tuple(_question(record, place) for place, record in enumerate(records)))


def _question(record: JsonRecord, place: int) -> Question:
    prompt = record.need("question").strip()
    answer = record.need("answer").strip()
    options = dict(_OPTION.findall(prompt))
    image = record_image(record)
    return Question(
        id=str(place),
        text=_OPTION.split(prompt)[0].strip() if options else prompt,
        prompt=prompt,  # options and instruction are part of it
        images=(image,),
        options=options if answer in options else {},
        answer=answer,
        group=image.key,
    )


def _parse(question: Question, answer: str) -> Parsed:
    if question.options:
        found = parse_choice(question, answer)
    else:
        found = {"strict": _open(question, answer), "vlmevalkit": _as_choice(question, answer)}
    return {**found, "lmms-eval": _lmms_eval(question, answer), "cambrian": _cambrian(question, answer)}


def _open(question: Question, answer: str) -> str | None:
    equal = question.answer is not None and normalise(answer).rstrip(".") == normalise(question.answer).rstrip(".")
    return question.answer if equal else None


def _as_choice(question: Question, answer: str) -> str | None:
    # As VLMEvalKit treats open questions of multiple-choice benchmarks.
    if question.answer is None:
        return None
    found = extract_vlmevalkit(answer, {"A": question.answer, "B": "Other Answers"})
    return question.answer if found == "A" else None


def _lmms_eval(question: Question, answer: str) -> str | None:
    truth = question.answer or ""
    if not truth or truth.upper() in tuple(_LETTERS):
        return lmms_eval.ranked_letter(answer, _LETTERS)
    return truth if answer.lower().strip().rstrip(".") == truth.lower() else None


def _cambrian(question: Question, answer: str) -> str | None:
    words = lmms_eval.cambrian_statement(answer).split()
    right = question.answer is not None and words[:1] == [question.answer.lower()]
    return question.answer if right else None


register(
    ChoiceBenchmark(
        name="realworldqa",
        title="RealWorldQA",
        description=Description(
            source="Hugging Face: xai-org/RealworldQA, lmms-lab/RealWorldQA; VLMEvalKit: RealWorldQA.tsv",
            form="test-….parquet (image, question with its options and instruction, answer); or RealWorldQA.tsv in "
            "MMBench's form",
            licence="CC BY-ND 4.0",
            prompt=f"the question as it is; of the .tsv: question, one option a line, “{ENGLISH}”",
            metric="accuracy",
            scored=(LOCALLY,),
        ),
        files=(
            *(f"{folder}/data/test-00000-of-*.parquet" for folder in ("RealworldQA", "RealWorldQA", "realworldqa")),
            "RealWorldQA.tsv",
            "data/test-00000-of-*.parquet",
        ),
        read=_read,
        parse=_parse,
        rules={**ABOUT, "lmms-eval": lmms_eval.RANKED_ABOUT, "cambrian": lmms_eval.CAMBRIAN_ABOUT},
        checksums={"RealWorldQA.tsv": "4de008f55dc4fd008ca9e15321dc44b7"},
    )
)
