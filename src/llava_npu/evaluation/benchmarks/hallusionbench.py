"""HallusionBench: language hallucination and visual illusion (Guan et al. 2023, arXiv:2310.14566)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction import yes_no
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

_RULES = ("strict", "vlmevalkit")


def _read(path: Path) -> Dataset:
    dataset = yes_no.read_yes_no_table(path, _of_row, instruction=None)
    blind = any(not question.images for question in dataset.questions)
    note = "Questions without an image count by the rule strict; by vlmevalkit they do not, as there."
    return replace(dataset, notes=(note,)) if blind else dataset


def _of_row(row: Row, question: Question) -> Question:
    # The index, as "VD_illusion_0_3_1_2": …_set_figure_question.
    parts = question.id.split("_")
    if len(parts) < 6:
        raise row.error("index", f"{question.id!r}: six parts are expected, the last three set, figure and question.")
    named = (question.l2_category, parts[3])
    facts = {"figure": "_".join((*named, parts[4])), "question": "_".join((*named, parts[5]))}
    facts["has image"] = yes_no.YES if question.images else yes_no.NO  # whatever a model is shown of it
    # Figures and questions of a set are entangled: the set is what is resampled.
    return replace(question, group="_".join(named), facts=facts)


def _parse(question: Question, answer: str) -> Parsed:
    return {rule: yes_no.RULES[rule](answer) for rule in _RULES}


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    scores = []
    for rule in extraction_rules(parsed):
        known = [question for question in questions if question.answer is not None and _counts(question, rule)]
        right = {question.id: parsed.get(question.id, {}).get(rule) == question.answer for question in known}
        scores += tabulate([hit(question, right[question.id]) for question in known], "aAcc", rule)
        for metric, fact in (("fAcc", "figure"), ("qAcc", "question")):
            for level in LEVELS:
                units = _all_right(known, right, fact, level)
                scores += tabulate(units, metric, rule, labels=partial(_labels_of, level))
    return scores


def _counts(question: Question, rule: str) -> bool:
    # The published numbers of VLMEvalKit are without the questions that have no image.
    return rule != "vlmevalkit" or question.facts["has image"] == yes_no.YES


def _all_right(questions: Sequence[Question], right: Mapping[str, bool], fact: str, level: str) -> list[Unit]:
    # As VLMEvalKit: overall, a figure is named by l2-category, set and figure; each category is scored on its own.
    groups: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.facts[fact], question.category if level == CATEGORY else ""].append(question)
    return [hit(group[0], all(right[question.id] for question in group)) for group in groups.values()]


def _labels_of(level: str, question: Question) -> list[Label]:
    return [label for label in own_labels(question) if label[0] == level]


def _review(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    return []


register(
    Benchmark(
        name="hallusionbench",
        title="HallusionBench",
        description=Description(
            source="https://github.com/tianyi-lab/HallusionBench (VLMEvalKit: HallusionBench.tsv)",
            form="HallusionBench.tsv: index (…_set_figure_question), question, answer (Yes or No), category, "
            "l2-category, image (may be empty)",
            licence="BSD-3-Clause",
            prompt="the question alone; greedy, at most 512 new tokens",
            metric="aAcc (questions), fAcc (figures of which all questions are right), qAcc (questions right about "
            "every "
            "figure), by category",
            scored=(LOCALLY,),
        ),
        files=("HallusionBench.tsv",),
        read=_read,
        parse=_parse,
        score=_score,
        review=_review,
        max_new_tokens=512,
        rules={rule: yes_no.ABOUT[rule] for rule in _RULES},
        checksums={"HallusionBench.tsv": "0c23ac0dc9ef46832d7a24504f2a0c7c"},
    )
)
