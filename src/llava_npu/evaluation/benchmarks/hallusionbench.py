"""HallusionBench: language hallucination and visual illusion (Guan et al. 2023, arXiv:2310.14566)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction import yes_no
from llava_npu.evaluation.formats.json_files import JsonRecord, read_json_list
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.formats.tables import Row
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import (
    CATEGORY,
    LEVELS,
    Label,
    Score,
    Unit,
    extraction_rules,
    hit,
    own_labels,
    tabulate,
)

_TRUTHS = {"0": yes_no.NO, "1": yes_no.YES}


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        dataset = yes_no.read_yes_no_table(path, _of_row, instruction=None)
    else:
        records, digest = read_json_list(path)
        with_image = any(record.get("filename") for record in records)
        folder = QuestionImages(path, ("hallusion_bench", ".")) if with_image else None
        questions = [_of_record(record, folder) for record in records]
        dataset = Dataset(path, digest, tuple(questions))
    blind = any(not question.images for question in dataset.questions)
    note = (
        "Questions without an image count by the rule strict, as the authors count them: an answer that says neither "
        "yes nor no (“I cannot tell”) is right there, and they belong to no figure. By vlmevalkit they do not count."
    )
    return replace(dataset, notes=(note,)) if blind else dataset


def _of_record(record: JsonRecord, folder: QuestionImages | None) -> Question:
    """A question of the authors' HallusionBench.json, with the id that VLMEvalKit's table gives it."""
    fields = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
    name = "_".join(record.need(field) for field in fields)
    answer = record.need("gt_answer")
    if answer not in _TRUTHS:
        raise record.error("gt_answer", f"{answer!r} is neither 0 (no) nor 1 (yes).")
    text = record.need("question")
    images: tuple[ImageSource, ...] = ()
    if record.get("filename") and folder is not None:
        value = record.need("filename").removeprefix("./").removeprefix("hallusion_bench/")
        images = (folder.image(JsonRecord({"filename": value}, record.file, record.place), "filename"),)
    question = Question(
        id=name,
        text=text,
        prompt=text,
        images=images,
        answer=_TRUTHS[answer],
        category=record.need("category"),
        l2_category=record.need("subcategory"),
    )
    return _grouped(question, record.need("set_id"), record.need("figure_id"), record.need("question_id"))


def _of_row(row: Row, question: Question) -> Question:
    # The index, as "VD_illusion_0_3_1_2": …_set_figure_question.
    parts = question.id.split("_")
    if len(parts) < 6:
        raise row.error("index", f"{question.id!r}: six parts are expected, the last three set, figure and question.")
    return _grouped(question, *parts[3:6])


def _grouped(question: Question, set_id: str, figure: str, number: str) -> Question:
    named = (question.l2_category, set_id)
    facts = {"figure": "_".join((*named, figure)), "question": "_".join((*named, number))}
    facts["has image"] = yes_no.YES if question.images else yes_no.NO  # whatever a model is shown of it
    # Figures and questions of a set are entangled: the set is what is resampled.
    return replace(question, group="_".join(named), facts=facts)


def _parse(question: Question, answer: str) -> Parsed:
    # Neither yes nor no is a reading of its own, as the authors' "unclear".
    return {"strict": yes_no.strict(answer) or yes_no.UNKNOWN, "vlmevalkit": yes_no.vlmevalkit(answer)}


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    if question.answer is None:
        return None
    unclear_is_right = rule == "strict" and question.facts["has image"] == yes_no.NO
    return float(reading == question.answer or (unclear_is_right and reading == yes_no.UNKNOWN))


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    scores = []
    for rule in extraction_rules(parsed):
        known = [question for question in questions if question.answer is not None and _counts(question, rule)]
        right = {each.id: bool(_credit(each, rule, parsed.get(each.id, {}).get(rule))) for each in known}
        scores += tabulate([hit(question, right[question.id]) for question in known], "aAcc", rule)
        for metric, fact in (("fAcc", "figure"), ("qAcc", "question")):
            for level in LEVELS:
                # A question without image belongs to no figure.
                of_fact = [each for each in known if fact == "question" or each.facts["has image"] == yes_no.YES]
                units = _all_right(of_fact, right, fact, level, by_category=rule == "strict")
                scores += tabulate(units, metric, rule, labels=partial(_labels_of, level))
    return scores


def _counts(question: Question, rule: str) -> bool:
    # The published numbers of VLMEvalKit are without the questions that have no image.
    return rule != "vlmevalkit" or question.facts["has image"] == yes_no.YES


def _all_right(
    questions: Sequence[Question], right: Mapping[str, bool], fact: str, level: str, *, by_category: bool
) -> list[Unit]:
    # As VLMEvalKit: overall, a figure is named by l2-category, set and figure; each category is scored on its own. The
    # authors name it by category too.
    groups: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.facts[fact], question.category if by_category or level == CATEGORY else ""].append(question)
    return [hit(group[0], all(right[question.id] for question in group)) for group in groups.values()]


def _labels_of(level: str, question: Question) -> list[Label]:
    return [label for label in own_labels(question) if label[0] == level]


register(
    Benchmark(
        name="hallusionbench",
        title="HallusionBench",
        description=Description(
            source="https://github.com/tianyi-lab/HallusionBench (VLMEvalKit: HallusionBench.tsv)",
            form="HallusionBench.json as published (category, subcategory, visual_input, set_id, figure_id, "
            "question_id, question, gt_answer, filename) with hallusion_bench/; or HallusionBench.tsv: index "
            "(…_set_figure_question), question, answer (Yes or No), category, l2-category, image (may be empty)",
            licence="BSD-3-Clause",
            prompt="the question alone",
            metric="aAcc (questions), fAcc (figures of which all questions are right), qAcc (questions right about "
            "every figure), by category",
            scored=(LOCALLY,),
        ),
        files=("HallusionBench.tsv", "HallusionBench.json"),
        read=_read,
        parse=_parse,
        score=_score,
        credit=_credit,
        max_new_tokens=512,
        rules=yes_no.about("strict", "vlmevalkit"),
        checksums={"HallusionBench.tsv": "0c23ac0dc9ef46832d7a24504f2a0c7c"},
    )
)
