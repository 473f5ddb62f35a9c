"""Open questions on one's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_npu.data.formats.message_forms import refuse_unread_media
from llava_npu.data.image_sources import ImageSource
from llava_npu.evaluation.benchmarks import LOCALLY, Description, Parsed, register
from llava_npu.evaluation.extraction.open_answers import (
    OpenBenchmark,
    exact_credit,
    most_frequent,
    score_exact,
    score_soft,
    soft_credit,
)
from llava_npu.evaluation.formats.json_files import JsonRecord, read_jsonl
from llava_npu.evaluation.formats.llava_files import SHORT, check_unique, with_instruction
from llava_npu.evaluation.formats.locating import QuestionImages
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import Score

_ANNOTATORS = 10


def _read(path: Path) -> Dataset:
    records, digest = read_jsonl(path)
    check_unique(records)
    folder = QuestionImages(path, (".",))
    return Dataset(path, digest, tuple(_question(record, folder) for record in records))


def _question(record: JsonRecord, folder: QuestionImages) -> Question:
    text = record.need("question")
    if "answer" in record.values and "answers" in record.values:
        raise record.error("answer", "both `answer` and `answers` are given; keep one.")
    references = (record.need("answer"),) if record.get("answer") else record.texts("answers")
    images: tuple[ImageSource, ...] = (folder.image(record),) if record.get("image") else ()
    if not images:
        refuse_unread_media(record.values, f"{record.file}, {record.place}")
    return Question(
        id=record.need("question_id"),
        text=text,
        prompt=with_instruction(text),
        images=images,
        answer=most_frequent(references),
        references=references,
        group=record.need("question_id"),
        category=record.get("category"),
        split=record.get("split"),
    )


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    # Fewer annotators than ten cannot give the soft score its meaning.
    annotated = [question for question in questions if len(question.references) >= _ANNOTATORS]
    return [*score_exact(questions, parsed), *score_soft(annotated, parsed)]


def _credit(question: Question, rule: str, reading: str | None) -> float | None:
    credit = soft_credit if len(question.references) >= _ANNOTATORS else exact_credit
    return credit(question, rule, reading)


register(
    OpenBenchmark(
        name="vqa_jsonl",
        title="Open questions (your own .jsonl)",
        description=Description(
            source="your own",
            form=".jsonl: question_id, question, image (a path below the file's folder; optional), answer (a text) or "
            "answers (a list; none: predictions only); optional: category, split",
            licence="yours",
            prompt=f"question, “{SHORT}”",
            metric="exact match with any answer, in normal form; VQA accuracy where there are ten or more answers",
            scored=(LOCALLY,),
        ),
        files=(),
        read=_read,
        score=_score,
        credit=_credit,
    )
)
