"""DocVQA and InfographicVQA: reading documents and infographics (Mathew et al. 2020, arXiv:2007.00398; 2021,
arXiv:2104.12756), the validation splits; test splits are predicted for the RRC's server.

ANLS as in its script (see `extraction.similarity`), to which lmms-eval's and VLMEvalKit's are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, SERVER, Benchmark, Description, Parsed, register
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark, most_frequent, read_open_table
from llava_npu.evaluation.extraction.similarity import anls
from llava_npu.evaluation.formats.json_files import JsonRecord, members, read_json_object
from llava_npu.evaluation.formats.llava_files import SHORT, with_instruction
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.formats.parquet import read_parquet, record_image
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.reports.submissions import Submission, as_json, number_or_text
from llava_npu.evaluation.statistics.accuracy import CATEGORY, OVERALL, Label, score_credits

_RULE = "anls"
# What the two data sets call the kinds of a question; each question may have several of each.
_KINDS = ("question_types", "answer_type", "evidence", "operation/reasoning")
_SEPARATOR = "\n"


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        return read_open_table(path)
    if path.suffix == ".json":
        whole, digest = read_json_object(path)
        records = members(whole, "data")
        folder = QuestionImages(path, ("documents", "images", "infographicsvqa_images", "."))
        return Dataset(path, digest, tuple(_question(record, _file_image(record, folder)) for record in records))
    records, digest = read_parquet(path)
    return Dataset(path, digest, tuple(_question(record, record_image(record)) for record in records))


def _file_image(record: JsonRecord, folder: QuestionImages) -> ImageSource:
    field = "image_local_name" if record.get("image_local_name") else "image"
    name = record.need(field).removeprefix("documents/")
    return folder.image(JsonRecord({field: name}, record.file, record.place), field)


def _question(record: JsonRecord, image: ImageSource) -> Question:
    text = record.need("question")
    references = record.texts("answers")
    return Question(
        id=record.need("questionId"),
        text=text,
        prompt=with_instruction(text),
        images=(image,),
        answer=most_frequent(references),
        references=references,
        group=image.key,
        category=_SEPARATOR.join(dict.fromkeys(kind for field in _KINDS for kind in record.texts(field))),
    )


def _parse(question: Question, answer: str) -> Parsed:
    return {_RULE: answer}


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    if not question.references:
        return None
    return anls(reading, question.references) if reading is not None else 0.0


def _labels(question: Question) -> list[Label]:
    return [(OVERALL, OVERALL), *((CATEGORY, kind) for kind in question.category.split(_SEPARATOR) if kind)]


def _submission(dataset: Dataset, answers: Mapping[str, str]) -> Mapping[str, bytes]:
    rows = [{"questionId": number_or_text(each.id), "answer": answers[each.id]} for each in dataset.questions]
    return {f"{dataset.path.name.split('-')[0]}_submission.json": as_json(rows)}


def _vqa(name: str, title: str, source: str, files: tuple[str, ...], checksums: Mapping[str, str]) -> Benchmark:
    return OpenBenchmark(
        name=name,
        title=title,
        description=Description(
            source=source,
            form="….parquet (questionId, question, answers, image, and the kinds of the question); or the RRC's .json "
            "(data: questionId, question, answers, image) with documents/ or images/; or VLMEvalKit's .tsv (index, "
            "question, answer as a list, image). Files of the test split have no answers",
            licence="for research, by the RRC's terms; documents from the UCSF library, infographics from the web",
            prompt=f"question, “{SHORT}”",
            metric="ANLS by kind of question",
            scored=(LOCALLY, SERVER),
        ),
        files=files,
        read=_read,
        parse=_parse,
        score=partial(score_credits, metric="ANLS", credit=_credit, labels=_labels),
        credit=_credit,
        rules={_RULE: "the RRC's script: normalised edit distance to the closest reference, nothing below one half"},
        checksums=checksums,
        submission=Submission("a list of questionId, answer (rrc.cvc.uab.es, challenge 17)", _submission),
    )


register(
    _vqa(
        "docvqa",
        "DocVQA (val)",
        "https://www.docvqa.org; Hugging Face: lmms-lab/DocVQA; VLMEvalKit: DocVQA_VAL.tsv",
        (
            "DocVQA/validation-00000-of-*.parquet",
            "DocVQA/DocVQA/validation-00000-of-*.parquet",
            *(f"{folder}val_v1.0_withQT.json" for folder in ("docvqa/", "DocVQA/", "")),
            "DocVQA_VAL.tsv",
        ),
        {"DocVQA_VAL.tsv": "d5ee77e1926ff10690d469c56b73eabf"},
    )
)
register(
    _vqa(
        "infovqa",
        "InfographicVQA (val)",
        "https://www.docvqa.org; Hugging Face: lmms-lab/DocVQA (InfographicVQA); VLMEvalKit: InfoVQA_VAL.tsv",
        (
            "InfographicVQA/validation-00000-of-*.parquet",
            "DocVQA/InfographicVQA/validation-00000-of-*.parquet",
            *(f"{folder}infographicsVQA_val_v1.0_withQT.json" for folder in ("infovqa/", "InfographicVQA/", "")),
            "InfoVQA_VAL.tsv",
        ),
        {"InfoVQA_VAL.tsv": "2342e9c225222f0ef4dec545ebb126fe"},
    )
)
