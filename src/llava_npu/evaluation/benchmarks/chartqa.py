"""ChartQA: questions about charts, from people and from generated descriptions (Masry et al. 2022, arXiv:2203.10244).

Relaxed accuracy as in QwenLM/Qwen-VL at aa00ed0, eval_mm/evaluate_vqa.py, which VLMEvalKit and (without removing spaces
around the answer) lmms-eval share; the three come from pix2struct. See `extraction.similarity`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, Description, Parsed, register
from llava_npu.evaluation.extraction.open_answers import OpenBenchmark, most_frequent, read_open_table
from llava_npu.evaluation.extraction.similarity import relaxed_match, relaxed_match_strict
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest, read_json_list
from llava_npu.evaluation.formats.llava_files import SHORT, with_instruction
from llava_npu.evaluation.formats.locating import QuestionImages, require_companion
from llava_npu.evaluation.formats.parquet import read_parquet, record_image
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import score_credits

_RULES = {
    "strict": "ours: the same, with “$1,200.”, “1200” and “12%”, “12” as equal numbers",
    "relaxed": "pix2struct's, as Qwen-VL, VLMEvalKit and lmms-eval have it: numbers within 5 %, texts equal but for "
    "case",
}
_COMPARE = {"strict": relaxed_match_strict, "relaxed": relaxed_match}
_KINDS = ("human", "augmented")


def _read(path: Path) -> Dataset:
    if path.suffix == ".tsv":
        # The published score is over both kinds of questions.
        table = read_open_table(path, secret=False)
        return table.map(lambda each: replace(each, category=_kind(each.split), split=""))
    if path.suffix == ".json":
        return _read_release(path)
    records, digest = read_parquet(path)
    return Dataset(path, digest, tuple(_of_row(record, place) for place, record in enumerate(records)))


def _of_row(record: JsonRecord, place: int) -> Question:
    column = "question" if "question" in record.values else "query"
    text = record.need(column)
    image = record_image(record)
    field = "answer" if "answer" in record.values else "label"
    references = record.texts(field) if isinstance(record.values.get(field), list) else (record.need(field),)
    if not all(reference.strip() for reference in references):
        raise record.error(field, "an answer is empty.")
    kind = record.get("type") or ("augmented" if record.get("human_or_machine") == "1" else "human")
    return _question(str(place), text, references, kind, image)


def _read_release(path: Path) -> Dataset:
    """The authors' archive: test_human.json and test_augmented.json, with png/."""
    questions: list[Question] = []
    digests = []
    folder = QuestionImages(path, ("png",))
    for kind in _KINDS:
        name = path.name.replace(_KINDS[0], kind).replace(_KINDS[1], kind)
        records, digest = read_json_list(require_companion(path, (name,), f"the {kind} questions"))
        digests.append(digest)
        for record in records:
            text = record.need("query")
            image = folder.image(record, "imgname")
            questions.append(_question(str(len(questions)), text, (record.need("label"),), kind, image))
    return Dataset(path, combined_digest(digests), tuple(questions))


def _question(name: str, text: str, references: tuple[str, ...], kind: str, image: ImageSource) -> Question:
    return Question(
        id=name,
        text=text,
        prompt=with_instruction(text),
        images=(image,),
        answer=most_frequent(references),
        references=references,
        group=image.key,
        category=_kind(kind),
    )


def _kind(name: str) -> str:
    return name.removesuffix("_test").removeprefix("test_")


def _parse(question: Question, answer: str) -> Parsed:
    return dict.fromkeys(_RULES, answer.strip())


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    if not question.references:
        return None
    return float(reading is not None and any(_COMPARE[rule](reading, truth) for truth in question.references))


register(
    OpenBenchmark(
        name="chartqa",
        title="ChartQA (test)",
        description=Description(
            source="https://github.com/vis-nlp/ChartQA; Hugging Face: lmms-lab/ChartQA, HuggingFaceM4/ChartQA; "
            "VLMEvalKit: ChartQA_TEST.tsv",
            form="test-….parquet (question, answer, type, image; or query, label, human_or_machine, image); or "
            "test_human.json and test_augmented.json (imgname, query, label) with png/; or ChartQA_TEST.tsv (index, "
            "question, answer, split, image)",
            licence="GPL-3.0",
            prompt=f"question, “{SHORT}”",
            metric="relaxed accuracy of human and augmented questions; overall is the published score",
            scored=(LOCALLY,),
        ),
        files=(
            *(f"{folder}data/test-00000-of-*.parquet" for folder in ("ChartQA/", "chartqa/")),
            *(f"{folder}test/test_human.json" for folder in ("ChartQA Dataset/", "ChartQA/", "chartqa/")),
            "ChartQA_TEST.tsv",
            "data/test-00000-of-*.parquet",
        ),
        read=_read,
        parse=_parse,
        score=partial(score_credits, metric="relaxed accuracy", credit=_credit),
        credit=_credit,
        rules=_RULES,
        checksums={"ChartQA_TEST.tsv": "c902e0aa9be5582a7aad6dcf52734b42"},
    )
)
