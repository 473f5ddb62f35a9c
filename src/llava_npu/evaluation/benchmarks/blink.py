"""BLINK: fourteen tasks that people solve at a glance (Fu et al. 2024, arXiv:2404.12390), the validation split.

The authors (zeyofu/BLINK_Benchmark at 2d6a779, eval/evaluate.py) average the tasks' accuracies; which option an answer
means they ask a GPT model. lmms-eval and VLMEvalKit average over questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_npu.data.image_sources import EmbeddedImage
from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, Description, Parsed, register, right_or_wrong
from llava_npu.evaluation.extraction import lmms_eval
from llava_npu.evaluation.extraction.choices import (
    ABOUT,
    ENGLISH,
    ChoiceForm,
    parse_choice,
    read_choices,
    score_vanilla,
)
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest
from llava_npu.evaluation.formats.parquet import read_parquet
from llava_npu.evaluation.judge import choice_judge
from llava_npu.evaluation.judge.choice_judge import JudgedChoiceBenchmark
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import Score, credited, extraction_rules, mean_of_parts, mean_ratio

_IMAGE = re.compile(r"image_\d+")
_TASKS = 14


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return read_choices(path, ChoiceForm(skips_empty_options=True))
    # Each task has a folder of its own: BLINK/Counting/val-00000-of-00001.parquet.
    files = sorted(path.parent.parent.glob(f"*/{path.name.split('-')[0]}-00000-of-*.parquet")) or [path]
    questions: list[Question] = []
    digests = []
    for file in files:
        records, digest = read_parquet(file)
        digests.append(digest)
        questions += map(_question, records)
    tasks = {question.category for question in questions}
    notes = (f"{len(tasks)} of {_TASKS} tasks are there: {', '.join(sorted(tasks))}.",) if len(tasks) < _TASKS else ()
    return Dataset(path, combined_digest(digests), tuple(questions), notes)


def _question(record: JsonRecord) -> Question:
    images = tuple(
        image
        for column, image in record.values.items()
        if _IMAGE.fullmatch(column) and isinstance(image, EmbeddedImage)
    )
    options = record.options("choices")
    secret = record.need("answer").strip("()") == "hidden"  # as the test split has it
    return Question(
        id=record.need("idx"),
        text=record.need("question"),
        prompt=f"{record.need('prompt')}\n{ENGLISH}",
        images=images,
        options=options,
        answer=None if secret else record.letter("answer", options),
        group=record.need("idx"),
        category=record.need("sub_task"),
    )


def _parse(question: Question, answer: str) -> Parsed:
    return {**parse_choice(question, answer), "lmms-eval": lmms_eval.first_letter(answer)}


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    scores = []
    for rule in extraction_rules(parsed):
        units = credited(questions, parsed, rule, right_or_wrong)
        scores += mean_of_parts(units, "mean of tasks", rule, lambda question: question.category, mean_ratio)
    return [*scores, *score_vanilla(questions, parsed)]


register(
    JudgedChoiceBenchmark(
        name="blink",
        title="BLINK (val)",
        description=Description(
            source="Hugging Face: BLINK-Benchmark/BLINK; VLMEvalKit: BLINK.tsv",
            form="a folder for each task with val-….parquet (idx, sub_task, question, prompt, choices, answer, image_1 "
            "…); the file of one task stands for all of them; or BLINK.tsv in MMBench's form",
            licence="Apache-2.0; images of 14 data sets under their own terms",
            prompt=f"all images, then the file's prompt (question and choices), “{ENGLISH}”; of the .tsv: question, "
            "one option a line, the same",
            metric="mean of the tasks' accuracies (the authors'); accuracy by task",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=(
            *(f"{folder}Art_Style/val-00000-of-*.parquet" for folder in ("BLINK/", "blink/", "")),
            "BLINK.tsv",
        ),
        read=_read,
        parse=_parse,
        score=_score,
        rules={**ABOUT, "lmms-eval": lmms_eval.FIRST_LETTER_ABOUT, choice_judge.RULE: choice_judge.ABOUT},
        checksums={"BLINK.tsv": "d5e8af148b10ac69f535ff7b23f3f989"},
    )
)
