"""GQA: compositional questions about real images (Hudson and Manning 2019, arXiv:1902.09506), balanced test-dev."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llava_npu.evaluation.benchmarks import LOCALLY, Description, Parsed, register
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark, read_open_table
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, read_json_table, read_jsonl
from llava_npu.evaluation.formats.llava_files import SHORT, check_unique, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, companion_file
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.reports.submissions import Submission, as_json
from llava_npu.evaluation.statistics.accuracy import score_credits

_QUESTIONS = "testdev_balanced_questions.json"
_PLACES = (f"data/{_QUESTIONS}", f"data/questions1.2/{_QUESTIONS}", f"data/questions/{_QUESTIONS}", _QUESTIONS)
_EDGE = re.compile(r"^(?:(?:a|an|the)\s+)|[\s.,;:!?\"']+$")


def _submitted(answer: str) -> str:
    """As convert_gqa_for_eval.py."""
    return answer.rstrip(".").lower()


def _strict(answer: str) -> str:
    """Lower case, without an article before and punctuation behind."""
    return _EDGE.sub("", " ".join(answer.casefold().split()))


_FORMS: dict[str, Callable[[str], str]] = {"strict": _strict, "llava": _submitted}


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return read_open_table(path)
    records, digest = read_jsonl(path)
    check_unique(records)
    images = QuestionImages(path, ("data/images", "images", "."))
    file = companion_file(path, _PLACES)
    annotations: dict[str, JsonRecord] = {}
    digests = [digest]
    if file:
        annotations, annotations_digest = read_json_table(file)
        digests.append(annotations_digest)
    questions = [_question(record, images, annotations) for record in records]
    notes = []
    if not file:
        places = ", ".join(_PLACES)
        notes.append(f"No {_QUESTIONS} next to the question file: predicted, not scored. Looked for: {places}.")
    else:
        missing = len(annotations.keys() - {question.id for question in questions})
        if missing:
            notes.append(f"{missing} questions of {_QUESTIONS} are not in the question file: not asked, not scored.")
    return Dataset(path, combined_digest(digests), tuple(questions), tuple(notes))


def _question(record: JsonRecord, images: QuestionImages, annotations: Mapping[str, JsonRecord]) -> Question:
    if not annotations:
        return llava_question(record, images)
    name = record.need("question_id")
    if name not in annotations:
        raise record.error("question_id", f"{name!r} is not in {_QUESTIONS}.")
    answer = annotations[name].need("answer")
    types: Any = annotations[name].values.get("types")
    kinds = types if isinstance(types, dict) else {}
    return llava_question(
        record,
        images,
        answer=answer,
        references=(answer,),
        category=str(kinds.get("semantic") or ""),
        l2_category=str(kinds.get("structural") or ""),
    )


def _parse(question: Question, answer: str) -> Parsed:
    return {rule: form(answer) for rule, form in _FORMS.items()}


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    # GQA's eval.py compares with the answer as it stands (it is lower case).
    truth = question.answer
    return None if truth is None else float(reading == (truth if rule == "llava" else _strict(truth)))


def _predictions(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    rows = [
        {"questionId": question.id, "prediction": _submitted(answers[question.id])} for question in dataset.questions
    ]
    return {"testdev_balanced_predictions.json": as_json(rows)}


register(
    OpenBenchmark(
        name="gqa",
        title="GQA (test-dev, balanced)",
        description=Description(
            source="https://cs.stanford.edu/people/dorarad/gqa, questions as LLaVA's eval.zip has them; VLMEvalKit: "
            "GQA_TestDev_Balanced.tsv",
            form=f"llava_gqa_testdev_balanced.jsonl (question_id, image, text) with data/{_QUESTIONS} (answer, types) "
            "and data/images/; or the .tsv (index, question, answer, image)",
            licence="CC BY 4.0",
            prompt=f"question, “{SHORT}”",
            metric="accuracy (exact match) by structural and semantic type",
            scored=(LOCALLY,),
        ),
        files=("gqa/llava_gqa_testdev_balanced.jsonl", "llava_gqa_testdev_balanced.jsonl", "GQA_TestDev_Balanced.tsv"),
        read=_read,
        parse=_parse,
        score=partial(score_credits, metric="accuracy", credit=_credit),
        credit=_credit,
        rules={
            "strict": "ours: lower case, no article before, no punctuation behind",
            "llava": "LLaVA's script: lower case, no periods behind",
        },
        checksums={"GQA_TestDev_Balanced.tsv": "99b62f22e224d9b2f32dcbe41359d1c9"},
        submission=Submission(
            "testdev_balanced_predictions.json: questionId, prediction (for GQA's eval.py)", _predictions
        ),
    )
)
