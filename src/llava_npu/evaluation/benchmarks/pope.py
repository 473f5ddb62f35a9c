"""POPE: is an object in the image that is not there? (Li et al. 2023, arXiv:2305.10355)

LLaVA's script pairs answers and labels by their order in two files, which one missing or moved line turns into noise
without a word. Here every question finds its label by image and question text, or an error names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction import yes_no
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, read_jsonl
from llava_npu.evaluation.formats.llava_files import SHORT, check_unique, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, require_companion
from llava_npu.evaluation.formats.tables import Row
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import (
    Score,
    Unit,
    extraction_rules,
    hit,
    in_part,
    overall_only,
    ratio,
    statistic,
    tabulate,
)
from llava_npu.evaluation.statistics.bootstrap import Array

_RULES = ("strict", "llava", "vlmevalkit")
_LABEL_FILE = "coco_pope_"

Labels = dict[tuple[str, str], str]  # image and question → yes or no


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return yes_no.read_yes_no_table(path, _of_row, SHORT)
    records, digest = read_jsonl(path)
    check_unique(records)
    images = QuestionImages(path, ("val2014", "images", "../coco/val2014", "."))
    labels, digests = _read_labels(require_companion(path, ("coco", "annotations", "."), "POPE's label files"))
    questions = [_labelled(record, images, labels) for record in records]
    asked = {(question.category, *_identity(record)) for question, record in zip(questions, records, strict=True)}
    notes = [
        f"{len(missing)} labelled questions of category {category} are not in the question file: not asked, not scored."
        for category, known in labels.items()
        if (missing := [key for key in known if (category, *key) not in asked])
    ]
    return Dataset(path, combined_digest([digest, *digests]), tuple(questions), tuple(notes))


def _of_row(row: Row, question: Question) -> Question:
    return replace(question, group=question.images[0].key if question.images else question.id)


def _labelled(
    record: JsonRecord, images: QuestionImages, labels: Mapping[str, Mapping[tuple[str, str], str]]
) -> Question:
    category = record.need("category")
    if category not in labels:
        raise record.error("category", f"{category!r} has no label file. There are labels for: {', '.join(labels)}.")
    key = _identity(record)
    if key not in labels[category]:
        file = f"{_LABEL_FILE}{category}.json"
        raise record.error("text", f"no label in {file} for image {key[0]!r}, question {key[1]!r}.")
    return llava_question(record, images, answer=labels[category][key], group=record.need("image"))


def _read_labels(folder: Path) -> tuple[dict[str, Labels], list[str]]:
    labels: dict[str, Labels] = {}
    digests = []
    for path in sorted(folder.glob(f"{_LABEL_FILE}*.json")):
        records, digest = read_jsonl(path)
        of_category: Labels = {}
        for record in records:
            label = record.need("label").strip().lower()
            if label not in (yes_no.YES, yes_no.NO):
                raise record.error("label", f"{label!r} is neither yes nor no.")
            if of_category.setdefault(_identity(record), label) != label:
                raise record.error("label", "the same question about the same image is labelled yes and no.")
        labels[path.stem.removeprefix(_LABEL_FILE)] = of_category
        digests.append(digest)
    if not labels:
        raise UserError(f"{folder} holds no label file {_LABEL_FILE}*.json.")
    return labels, digests


def _identity(record: JsonRecord) -> tuple[str, str]:
    """Image and question. The label files were corrected since LLaVA's questions: "imange", and a before vowels."""
    words = record.need("text").split("\n")[0].split()
    corrected = [{"an": "a", "imange?": "image?", "imange": "image"}.get(word, word) for word in words]
    return record.need("image"), " ".join(corrected)


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    # A question may be in several categories ("popular,random"): it counts once in each, as in VLMEvalKit.
    known = [
        replace(question, category=category.strip())
        for question in questions
        if question.answer is not None
        for category in question.category.split(",")
    ]
    categories = sorted({question.category for question in known})
    scores = []
    for rule in extraction_rules(parsed):
        said = {question.id: parsed.get(question.id, {}).get(rule) for question in known}
        confusion = [Unit(question, _confusion(question, said[question.id])) for question in known]
        scores += tabulate(confusion, "F1", rule, _f1)
        if len(categories) > 1:
            # Images are resampled for all categories at once.
            places = [in_part(unit, unit.question.category, categories) for unit in confusion]
            scores += tabulate(places, "mean F1", rule, _mean_f1, overall_only)
        right = [hit(question, said[question.id] == question.answer) for question in known]
        scores += tabulate(right, "accuracy", rule)
        scores += tabulate(confusion, "precision", rule, _precision)
        scores += tabulate(confusion, "recall", rule, _recall)
        scores += tabulate([hit(question, said[question.id] == yes_no.YES) for question in known], "yes ratio", rule)
    return scores


def _confusion(question: Question, said: str | None) -> tuple[float, float, float]:
    """True positives, false positives, false negatives. No answer at all is the wrong one; "unknown" is a no."""
    positive = said == yes_no.YES if said is not None else question.answer == yes_no.NO
    truth = question.answer == yes_no.YES
    return float(positive and truth), float(positive and not truth), float(truth and not positive)


@statistic
def _f1(sums: Array) -> Array:
    return ratio(np.stack([2 * sums[:, 0], 2 * sums[:, 0] + sums[:, 1] + sums[:, 2]], axis=1))


@statistic
def _precision(sums: Array) -> Array:
    return ratio(np.stack([sums[:, 0], sums[:, 0] + sums[:, 1]], axis=1))


@statistic
def _recall(sums: Array) -> Array:
    return ratio(np.stack([sums[:, 0], sums[:, 0] + sums[:, 2]], axis=1))


@statistic
def _mean_f1(sums: Array) -> Array:
    parts = np.split(sums, sums.shape[1] // 3, axis=1)
    return np.mean([_f1(part) for part in parts], axis=0)


def _review(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    known = [question for question in questions if question.answer is not None]
    yes = sum(question.answer == yes_no.YES for question in known)
    if not known or not yes:
        return []
    share = yes / len(known)
    return [f"Always answering yes would score an F1 of {2 * share / (1 + share):.1%} and an accuracy of {share:.1%}."]


register(
    Benchmark(
        name="pope",
        title="POPE",
        description=Description(
            source="https://github.com/AoiDragon/POPE (output/coco), questions as LLaVA's eval.zip has them; images: "
            "COCO val2014",
            form="llava_pope_test.jsonl (question_id, image, text, category) with coco/coco_pope_{adversarial,popular,"
            "random}.json (image, text, label; joined by image and question) and val2014/; or VLMEvalKit's POPE.tsv",
            licence="MIT; COCO annotations CC BY 4.0, images under Flickr's terms",
            prompt=f"question, “{SHORT}”",
            metric="F1 by category (adversarial, popular, random), their mean, accuracy, precision, recall, share of "
            "yes",
            scored=(LOCALLY,),
        ),
        files=("pope/llava_pope_test.jsonl", "llava_pope_test.jsonl", "POPE.tsv"),
        read=_read,
        parse=yes_no.parse_by(*_RULES),
        score=_score,
        review=_review,
        rules=yes_no.about(*_RULES),
        checksums={"POPE.tsv": "c12f5acb142f2ef1f85a26ba2fbe41d5"},
    )
)
