"""VizWiz: questions of blind people about their own photographs (Gurari et al. 2018, arXiv:1802.08218)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, Description, register
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark, most_frequent, read_open_table
from llava_npu.evaluation.extraction.vqa import normalise_as_original
from llava_npu.evaluation.formats.json_files import read_jsonl
from llava_npu.evaluation.formats.llava_files import SHORT, check_unique, llava_question
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.questions import Dataset
from llava_npu.evaluation.reports.submissions import Submission, as_json

_INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."
_CLOSED = (
    "EvalAI's challenge 2185 takes no more submissions (https://github.com/haotian-liu/LLaVA/issues/1916). Evaluate "
    "the validation split and say so (VizWiz.tsv, or lines that have `answers`), or send submission/vizwiz.json to the "
    "organisers (vizwiz.org). A test file with answers is scored here; `--predictions` then takes this run's "
    "predictions.jsonl."
)


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return read_open_table(path, column="answers", instruction=f"{_INSUFFICIENT}\n{SHORT}")
    records, digest = read_jsonl(path)
    check_unique(records)
    images = QuestionImages(path, ("test", "val", "images", "."))
    questions = []
    for record in records:
        answers = record.texts("answers")
        facts = {"image": record.need("image")}
        question = llava_question(record, images, references=answers, answer=most_frequent(answers), facts=facts)
        questions.append(question)
    return Dataset(path, digest, tuple(questions))


def _answers(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    rows = [
        {"image": question.facts["image"], "answer": normalise_as_original(answers[question.id])}
        for question in dataset.questions
        if "image" in question.facts
    ]
    return {"vizwiz.json": as_json(rows)} if rows else {}


register(
    OpenBenchmark(
        name="vizwiz",
        title="VizWiz (test)",
        description=Description(
            source="https://vizwiz.org/tasks-and-datasets/vqa, questions as LLaVA's eval.zip has them; VLMEvalKit: "
            "VizWiz.tsv (val)",
            form="llava_test.jsonl (question_id, image, text) with test/; lines that have `answers` are scored here; "
            "or VizWiz.tsv (index, question, answers as a list, image)",
            licence="CC BY 4.0",
            prompt=f"question, “{_INSUFFICIENT}”, “{SHORT}” (LLaVA's file has them; added to those of the .tsv)",
            metric="VQA accuracy over ten annotators",
            scored=(LOCALLY,),
        ),
        files=("vizwiz/llava_test.jsonl", "llava_test.jsonl", "VizWiz.tsv"),
        read=_read,
        checksums={"VizWiz.tsv": "fa4ac4164467563ed2fac6eac6631bd0"},
        submission=Submission(
            "vizwiz.json: image, answer (normal form of LLaVA's script), as eval.ai's challenge 2185 took it", _answers
        ),
        closed=_CLOSED,
    )
)
