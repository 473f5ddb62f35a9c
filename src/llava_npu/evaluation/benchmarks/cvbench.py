"""CV-Bench: counting, spatial relation, depth and distance in known data sets (Tong et al. 2024, Cambrian-1,
arXiv:2406.16860).

The authors' score (appendix C, and the data set's card) takes accuracy by source: 2D is the mean of ADE20K and COCO, 3D
is Omni3D, and the whole is the mean of both. lmms-eval's and Cambrian-1's ways to read an answer are in
`extraction.lmms_eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava_npu.data.image_sources import ImageSource
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import LOCALLY, MAY_JUDGE, Description, Parsed, register, right_or_wrong
from llava_npu.evaluation.extraction import lmms_eval
from llava_npu.evaluation.extraction.choices import ABOUT, ENGLISH, ChoiceForm, parse_choice, read_choices
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, read_jsonl
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.formats.parquet import read_parquet, record_image
from llava_npu.evaluation.judge import choice_judge
from llava_npu.evaluation.judge.choice_judge import JudgedChoiceBenchmark
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import (
    CATEGORY,
    Label,
    Score,
    Unit,
    credited,
    extraction_rules,
    mean_of_parts,
    mean_ratio,
    own_labels,
    ratio,
    statistic,
    tabulate,
)
from llava_npu.evaluation.statistics.bootstrap import Array

_SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}


def _read(path: Path) -> Dataset:
    dataset = _read_table(path) if path.suffix == ".tsv" else _read_release(path)
    missing = sorted(_SOURCES.keys() - {question.l2_category for question in dataset.questions})
    notes = (f"No {missing[0]} questions: no score of the whole benchmark.",) if missing else ()
    return replace(dataset, notes=(*dataset.notes, *notes))


def _read_table(path: Path) -> Dataset:
    """VLMEvalKit's: 2D or 3D alone, asked by the column `prompt`."""
    facts = ("source", "prompt")
    form = ChoiceForm(skips_empty_options=True, facts=lambda row: {name: row.text(name).strip() for name in facts})
    dataset = read_choices(path, form)
    for each in dataset.questions:
        if not each.facts["prompt"]:
            raise UserError(
                f"{path}, index {each.id}, column 'prompt': missing or empty; the questions are asked by it."
            )
        if _source(each) not in _SOURCES.get(each.split, ()):
            found = f"source {_source(each)!r} of split {each.split!r}"
            raise UserError(f"{path}, index {each.id}: {found}: {_SOURCES} are known.")
    return dataset.map(
        lambda each: replace(each, l2_category=each.split, split="", prompt=f"{each.facts['prompt']}\n{ENGLISH}")
    )


def _read_release(path: Path) -> Dataset:
    records: list[JsonRecord] = []
    digests = []
    for file in _both(path):
        of_file, digest = read_parquet(file) if file.suffix == ".parquet" else read_jsonl(file)
        records += of_file
        digests.append(digest)
    images = QuestionImages(path, ("img", ".")) if path.suffix == ".jsonl" else None
    return Dataset(path, combined_digest(digests), tuple(_question(record, images) for record in records))


def _both(path: Path) -> list[Path]:
    """test_2d and test_3d, whichever of them is given; another file alone."""
    files = [path.with_name(path.name.replace("2d", each).replace("3d", each)) for each in ("2d", "3d")]
    return [file for file in dict.fromkeys(files) if file == path or file.is_file()]


def _question(record: JsonRecord, folder: QuestionImages | None) -> Question:
    image: ImageSource = record_image(record) if folder is None else folder.image(record, "filename")
    options = record.options("choices")
    answer = record.letter("answer", options)
    kind, source = record.need("type"), record.need("source")
    if source not in _SOURCES.get(kind, ()):
        raise record.error("source", f"{source!r} of type {kind!r}: {_SOURCES} are known.")
    return Question(
        id=record.need("idx"),
        text=record.need("question"),
        prompt=f"{record.need('prompt')}\n{ENGLISH}",
        images=(image,),
        options=options,
        answer=answer,
        group=image.key,
        category=record.need("task"),
        l2_category=kind,
        facts={"source": source},
    )


def _parse(question: Question, answer: str) -> Parsed:
    return {
        **parse_choice(question, answer),
        "cambrian": lmms_eval.cambrian_letter(answer),
        "lmms-eval": lmms_eval.first_letter(answer),
    }


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    scores = []
    kinds = {question.l2_category for question in questions}
    for rule in extraction_rules(parsed):
        units = credited(questions, parsed, rule, right_or_wrong)
        if kinds == _SOURCES.keys():
            scores += mean_of_parts(units, "CV-Bench", rule, _source, _both_kinds)
        for kind in sorted(kinds):
            of_kind: list[Unit] = [unit for unit in units if unit.question.l2_category == kind]
            scores += mean_of_parts(of_kind, f"CV-Bench {kind}", rule, _source, mean_ratio)
        scores += tabulate(units, "accuracy", rule, labels=_labels)
    return scores


def _source(question: Question) -> str:
    return question.facts["source"]


@statistic
def _both_kinds(sums: Array) -> Array:
    flat = len(_SOURCES["2D"]) * 2  # amounts; the sources' names stand in this order
    return np.mean([mean_ratio(sums[:, :flat]), ratio(sums[:, flat:])], axis=0)


def _labels(question: Question) -> list[Label]:
    return [*own_labels(question), (CATEGORY, _source(question))]


register(
    JudgedChoiceBenchmark(
        name="cvbench",
        title="CV-Bench",
        description=Description(
            source="Hugging Face: nyu-visionx/CV-Bench; VLMEvalKit: CV-Bench-2D.tsv, CV-Bench-3D.tsv",
            form="test_2d.parquet and test_3d.parquet (idx, type, task, image, question, choices, answer, prompt, "
            "source); or test_2d.jsonl and test_3d.jsonl with img/ (filename); or CV-Bench-2D.tsv (or 3D) in MMBench's "
            "form, with source and prompt",
            licence="Apache-2.0; images of ADE20K, COCO and Omni3D under their own terms",
            prompt=f"the file's prompt (question and choices), “{ENGLISH}”",
            metric="CV-Bench: mean of 2D (mean of ADE20K and COCO) and 3D (Omni3D); accuracy by type, task and source",
            scored=(LOCALLY, MAY_JUDGE),
        ),
        files=(
            *(f"{folder}test_2d.{kind}" for kind in ("parquet", "jsonl") for folder in ("CV-Bench/", "")),
            "CV-Bench-2D.tsv",
        ),
        read=_read,
        parse=_parse,
        score=_score,
        rules={
            **ABOUT,
            "cambrian": lmms_eval.CAMBRIAN_ABOUT,
            "lmms-eval": lmms_eval.FIRST_LETTER_ABOUT,
            choice_judge.RULE: choice_judge.ABOUT,
        },
        checksums={
            "CV-Bench-2D.tsv": "a7cff4cc2857cc237ee2b89e62bccb2d",
            "CV-Bench-3D.tsv": "bb94c0d568d652d15b60e001ac40a170",
        },
    )
)
