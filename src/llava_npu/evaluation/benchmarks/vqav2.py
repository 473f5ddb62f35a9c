"""VQA v2 (Goyal et al. 2017, arXiv:1612.00837): predictions for the server, or scores where answers are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, SERVER, Description, register
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark, most_frequent
from llava_npu.evaluation.extraction.vqa import normalise_as_original
from llava_npu.evaluation.formats.json_files import read_jsonl
from llava_npu.evaluation.formats.llava_files import SHORT, check_unique, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages, companion_file
from llava_npu.evaluation.questions import Dataset
from llava_npu.evaluation.reports.submissions import Submission, as_json, number_or_text

_WHOLE_TEST = "llava_vqav2_mscoco_test2015.jsonl"


def _read(path: Path) -> Dataset:
    records, digest = read_jsonl(path)
    check_unique(records)
    images = QuestionImages(path, ("test2015", "val2014", "images", "."))
    questions = []
    for record in records:
        answers = record.texts("answers")
        questions.append(llava_question(record, images, references=answers, answer=most_frequent(answers)))
    notes = []
    if "test-dev" in path.name and companion_file(path, (_WHOLE_TEST,)) is None:
        notes.append(
            f"The server wants an answer to every question of test2015. {_WHOLE_TEST} is not next to {path.name}: the "
            "submission holds this file's questions only."
        )
    asked = [question.id for question in questions]
    missing = set(asked) - set(_submitted_ids(path, asked))
    if missing:
        notes.append(f"{len(missing)} questions are not in {_WHOLE_TEST} (first: {min(missing)}): not submitted.")
    return Dataset(path, digest, tuple(questions), tuple(notes))


def _submitted_ids(file: Path, asked: Sequence[str]) -> list[str]:
    """All questions of test2015, if their file is there and any of these is among them; else these."""
    whole = companion_file(file, (_WHOLE_TEST,))
    if whole is None:
        return list(asked)
    records, _ = read_jsonl(whole)
    check_unique(records)
    names = [record.need("question_id") for record in records]
    return list(asked) if set(asked).isdisjoint(names) else names


def _answers(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    # As convert_vqav2_for_submission.py: all of test2015, "" where nothing was asked.
    names = _submitted_ids(dataset.path, [question.id for question in dataset.questions])
    rows = [
        {"question_id": number_or_text(name), "answer": normalise_as_original(answers[name]) if name in answers else ""}
        for name in names
    ]
    return {"vqav2.json": as_json(rows)}


register(
    OpenBenchmark(
        name="vqav2",
        title="VQA v2 (test-dev)",
        description=Description(
            source="https://visualqa.org, questions as LLaVA's eval.zip has them; images: COCO test2015",
            form="llava_vqav2_mscoco_test-dev2015.jsonl (question_id, image, text) with test2015/ and, for the "
            f"submission, {_WHOLE_TEST}; lines that have `answers` (ten texts) are scored here",
            licence="CC BY 4.0; images under Flickr's terms",
            prompt=f"question, “{SHORT}”",
            metric="VQA accuracy over ten annotators",
            scored=(SERVER, LOCALLY),
        ),
        files=("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test-dev2015.jsonl"),
        read=_read,
        submission=Submission(
            "vqav2.json: question_id, answer (normal form of LLaVA's script), every question of test2015, “” where not "
            "asked (eval.ai challenge 830)",
            _answers,
        ),
    )
)
