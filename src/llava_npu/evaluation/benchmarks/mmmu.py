"""MMMU: questions of college level with several images (Yue et al. 2023, arXiv:2311.16502), development and
validation split.

A few questions are open. As VLMEvalKit does, such an answer is read as a choice between the right answer and "Other
Answers" (rule `vlmevalkit`); the rule `strict` asks for the right answer's text in normal form.
"""

from __future__ import annotations

from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction.choices import (
    ABOUT,
    ENGLISH,
    parse_choice,
    read_choices,
    review_vanilla,
    score_vanilla,
)
from llava_npu.evaluation.extraction.rules import extract_vlmevalkit
from llava_npu.evaluation.extraction.vqa import normalise
from llava_npu.evaluation.questions import Dataset, Question

_OPEN = "Answer the question directly."


def _read(path: Path) -> Dataset:
    return read_choices(path, instruction=ENGLISH, circular=False, open_instruction=_OPEN)


def _parse(question: Question, answer: str) -> Parsed:
    if question.options:
        return parse_choice(question, answer)
    if question.answer is None:
        return dict.fromkeys(ABOUT)
    matched = extract_vlmevalkit(answer, {"A": question.answer, "B": "Other Answers"}) == "A"
    equal = bool(normalise(answer)) and normalise(answer) == normalise(question.answer)
    return {"strict": question.answer if equal else None, "vlmevalkit": question.answer if matched else None}


register(
    Benchmark(
        name="mmmu",
        title="MMMU (val)",
        description=Description(
            source="https://mmmu-benchmark.github.io (VLMEvalKit: MMMU_DEV_VAL.tsv)",
            form="MMMU_DEV_VAL.tsv: index, question, A …, answer, category, l2-category, split (dev or validation), "
            "image "
            "(base64, or a list of several); without options where the question is open",
            licence="Apache-2.0",
            prompt="all images, then the question as it is (“<image 1>” stays as text), one option a line, "
            f"“{ENGLISH}”; open questions: “{_OPEN}”; greedy, at most 1024 new tokens",
            metric="accuracy by split, discipline and subject",
            scored=(LOCALLY,),
        ),
        files=("MMMU_DEV_VAL.tsv", "MMMU_VAL.tsv"),
        read=_read,
        parse=_parse,
        score=score_vanilla,
        review=review_vanilla,
        max_new_tokens=1024,
        rules=ABOUT,
        checksums={"MMMU_DEV_VAL.tsv": "585e8ad75e73f75dcad265dfd0417d64"},
    )
)
