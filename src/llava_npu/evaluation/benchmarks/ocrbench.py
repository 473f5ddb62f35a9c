"""OCRBench: a thousand questions about text in images (Liu et al. 2023, arXiv:2305.07895).

Scored as in Yuliang-Liu/MultimodalOCR at 794c36d, OCRBench/example.py: an answer is right if it contains a reference;
spaces count except in formulas (HME100k). VLMEvalKit does the same; lmms-eval also folds full-width letters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, Description, Parsed, register
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark, most_frequent, read_open_table
from llava_npu.evaluation.formats.json_files import JsonRecord, read_json_list
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.formats.parquet import read_parquet, record_image
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import score_credits

_RULE = "contains"
_RECOGNITION = "Text Recognition"
_FORMULAS = "Handwritten Mathematical Expression Recognition"


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        table = read_open_table(path, secret=False)
        return table.map(lambda each: replace(each, prompt=each.text, l2_category=_group_of(each.category)))
    if path.suffix == ".json":
        records, digest = read_json_list(path)
        folder = QuestionImages(path, ("OCRBench_Images", "images", "."))
        images: list[ImageSource] = [folder.image(record, "image_path") for record in records]
    else:
        records, digest = read_parquet(path)
        images = [record_image(record) for record in records]
    pairs = zip(records, images, strict=True)
    return Dataset(path, digest, tuple(_question(*pair, place) for place, pair in enumerate(pairs)))


def _question(record: JsonRecord, image: ImageSource, place: int) -> Question:
    kind = record.need("question_type" if "question_type" in record.values else "type")
    field = "answer" if "answer" in record.values else "answers"
    given = record.values[field] if field in record.values else record.need(field)
    references = record.texts(field) if isinstance(given, list) else (record.need(field),)
    if not references or not all(reference.strip() for reference in references):
        raise record.error(field, "empty: what is empty occurs in every answer.")
    text = record.need("question")
    return Question(
        id=str(place),
        text=text,
        prompt=text.strip(),
        images=(image,),
        answer=most_frequent(references),
        references=references,
        group=str(place),
        category=kind,
        l2_category=_group_of(kind),
    )


def _group_of(kind: str) -> str:
    return _RECOGNITION if kind.endswith(" Recognition") and kind != _FORMULAS else kind


def _parse(question: Question, answer: str) -> Parsed:
    return {_RULE: _plain(question, answer)}


def _plain(question: Question, text: str) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if question.category == _FORMULAS else text.lower()


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    if not question.references:
        return None
    return float(reading is not None and any(_plain(question, each) in reading for each in question.references))


register(
    OpenBenchmark(
        name="ocrbench",
        title="OCRBench",
        description=Description(
            source="https://github.com/Yuliang-Liu/MultimodalOCR; Hugging Face: echo840/OCRBench; VLMEvalKit: "
            "OCRBench.tsv",
            form="test-….parquet (dataset, question, question_type, answer, image); or OCRBench.json (dataset_name, "
            "type, question, answers, image_path) with OCRBench_Images/; or OCRBench.tsv (index, question, answer as a "
            "list, category, image)",
            licence="MIT; images from 29 data sets under their own terms",
            prompt="the question alone",
            metric="accuracy by type of question and for all of text recognition; the published score is the overall "
            "one times 1000",
            scored=(LOCALLY,),
        ),
        files=(
            *(f"{folder}data/test-00000-of-*.parquet" for folder in ("OCRBench/", "ocrbench/")),
            *(f"{folder}OCRBench.json" for folder in ("OCRBench/", "ocrbench/", "")),
            "OCRBench.tsv",
            "data/test-00000-of-*.parquet",
        ),
        read=_read,
        parse=_parse,
        score=partial(score_credits, metric="accuracy", credit=_credit),
        credit=_credit,
        rules={_RULE: "the authors' script: a reference occurs in the answer, case aside"},
        checksums={"OCRBench.tsv": "e953d98a987cc6e26ef717b61260b778"},
    )
)
