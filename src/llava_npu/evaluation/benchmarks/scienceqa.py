"""ScienceQA: school science with and without images (Lu et al. 2022, arXiv:2209.09513), the test split."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llava_npu.data.conversation.turns import IMAGE_MARK
from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed, register, right_or_wrong
from llava_npu.evaluation.extraction import rules
from llava_npu.evaluation.extraction.choices import ABOUT, ENGLISH, ChoiceBenchmark, parse_choice, read_choices
from llava_npu.evaluation.formats.json_files import (
    JsonRecord,
    combined_digest,
    members,
    read_json_list,
    read_json_object,
    read_json_table,
)
from llava_npu.evaluation.formats.llava_files import check_unique
from llava_npu.evaluation.formats.locating import QuestionImages, companion_file, require_companion
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import Score, credited, extraction_rules, tabulate

_SPLIT = "test"
_MAX_NOTED = 5


def _read(path: Path, with_image: bool) -> Dataset:
    dataset = read_choices(path) if path.suffix == ".tsv" else _read_llava(path)
    if not with_image:
        return dataset
    questions = (question for question in dataset.questions if question.images or question.defect)
    return replace(dataset, questions=tuple(questions))


def _read_llava(path: Path) -> Dataset:
    records, digest = read_json_list(path)
    check_unique(records, "id")
    problems, problems_digest = read_json_table(
        require_companion(path, ("problems.json",), "ScienceQA's problems.json")
    )
    digests = [digest, problems_digest]
    folder = QuestionImages(path, ("images/test", "images", ".")) if any("image" in r.values for r in records) else None
    questions = tuple(_question(record, problems, folder) for record in records)
    notes: list[str] = []
    splits = companion_file(path, ("pid_splits.json",))
    if splits:
        split, split_digest = read_json_object(splits)
        digests.append(split_digest)
        notes = _missing(set(split.texts(_SPLIT)), questions)
    return Dataset(path, combined_digest(digests), questions, tuple(notes))


def _missing(expected: set[str], questions: Sequence[Question]) -> list[str]:
    missing = sorted(expected - {question.id for question in questions})
    if not missing:
        return []
    shown = ", ".join(missing[:_MAX_NOTED])
    return [
        f"{len(missing)} of the {len(expected)} problems of split {_SPLIT!r} are not in the question file ({shown}, "
        "…). LLaVA's script counts them as wrong; here they are not scored."
    ]


def _question(record: JsonRecord, problems: Mapping[str, JsonRecord], folder: QuestionImages | None) -> Question:
    name = record.need("id")
    if name not in problems:
        raise record.error("id", f"{name!r} is not in problems.json.")
    problem = problems[name]
    choices = problem.texts("choices")
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise problem.error("choices", f"{len(choices)} choices; 2 to 26 are expected.")
    right: Any = problem.values.get("answer")
    if type(right) is not int or not 0 <= right < len(choices):
        raise problem.error("answer", f"{right!r} is not the place of one of the {len(choices)} choices.")
    images: tuple[ImageSource, ...] = ()
    if record.get("image") and folder is not None:
        images = (folder.image(record),)
    # Where the mark stands in the file does not matter: the image is put first, as in model_vqa_science.py.
    asked = members(record, "conversations")[0].need("value")
    lacks_image = IMAGE_MARK in asked and not images
    text = asked.replace(IMAGE_MARK, "").strip()
    options = problem.options("choices")
    return Question(
        id=name,
        text=text,
        prompt=f"{text}\n{ENGLISH}",
        images=images,
        options=options,
        answer=string.ascii_uppercase[right],
        group=name,
        category=problem.get("topic"),
        l2_category=problem.get("subject"),
        defect=f"its text contains {IMAGE_MARK!r}, but its field 'image' is missing" if lacks_image else "",
    )


def _parse(question: Question, answer: str) -> Parsed:
    return {**parse_choice(question, answer), "llava": rules.scienceqa(answer, question.options)}


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    scores = []
    for rule in extraction_rules(parsed):
        units = credited(questions, parsed, rule, right_or_wrong)
        scores += tabulate(units, "accuracy", rule)
        if not all(unit.question.images for unit in units):
            scores += tabulate([unit for unit in units if unit.question.images], "IMG accuracy", rule)
    return scores


def _scienceqa(name: str, title: str, metric: str, with_image: bool) -> Benchmark:
    return ChoiceBenchmark(
        name=name,
        title=title,
        description=Description(
            source="https://github.com/lupantech/ScienceQA (data/scienceqa), questions as LLaVA's eval.zip has them; "
            "VLMEvalKit: ScienceQA_TEST.tsv (questions with images only)",
            form="llava_test_CQM-A.json (id, image, conversations) with problems.json (choices, answer, subject, "
            "topic), pid_splits.json and images/test/; or ScienceQA_TEST.tsv in MMBench's form",
            licence="CC BY-NC-SA 4.0",
            prompt=f"context, question and options as the file has them, “{ENGLISH}”",
            metric=metric,
            scored=(LOCALLY,),
        ),
        files=("scienceqa/llava_test_CQM-A.json", "llava_test_CQM-A.json", "ScienceQA_TEST.tsv"),
        read=partial(_read, with_image=with_image),
        parse=_parse,
        score=_score,
        max_new_tokens=1024,
        rules={**ABOUT, "llava": rules.SCIENCEQA_ABOUT},
        checksums={
            "ScienceQA_TEST.tsv": "e42e9e00f9c59a80d8a5db35bc32b71f",
            "ScienceQA_VAL.tsv": "96320d05e142e585e7204e72affd29f3",
        },
    )


register(
    _scienceqa(
        "scienceqa",
        "ScienceQA (all questions)",
        "accuracy by subject and topic, and of the questions with an image (IMG)",
        with_image=False,
    )
)
register(_scienceqa("scienceqa_img", "ScienceQA (IMG)", "accuracy of the questions with an image", with_image=True))
