"""Small benchmark files and answerers that need no model."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from llava_npu.evaluation.extraction.choices import ROTATION_STEP
from llava_npu.evaluation.questions import Answer, Question

LETTERS = "ABCDEFGH"
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "split", "image")


def plain_image(colour: tuple[int, int, int], size: int = 24) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def encoded_image(colour: tuple[int, int, int], size: int = 24) -> str:
    buffer = io.BytesIO()
    plain_image(colour, size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def image_bytes(shade: int = 0, size: tuple[int, int] = (24, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 90, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Rows as data sets on Hugging Face have them; bytes become images ({bytes, path})."""
    from pyarrow import Table, parquet

    def cell(value: object) -> object:
        return {"bytes": value, "path": "a.png"} if isinstance(value, bytes) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(Table.from_pylist([{name: cell(value) for name, value in row.items()} for row in rows]), path)
    return path


def write_tsv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def question_row(
    group: int, options: Sequence[str], right: int, rotation: int = 0, **extra: object
) -> dict[str, object]:
    """Row of a question whose options are rotated; the image's colour tells groups apart."""
    rotated = [options[(place + rotation) % len(options)] for place in range(len(options))]
    row: dict[str, object] = {
        "index": group + rotation * ROTATION_STEP,
        "question": f"What is in image {group}?",
        "answer": LETTERS[rotated.index(options[right])],
        "category": f"kind {group % 2}",
        "l2-category": "objects",
        "image": encoded_image((group * 37 % 256, group * 91 % 256, 7)) if rotation == 0 else str(group),
    }
    return {**row, **dict(zip(LETTERS, rotated, strict=False)), **extra}


def circular_rows(groups: int = 5, options: int = 4, start: int = 1) -> list[dict[str, object]]:
    """`groups` questions with all their rotations; the right answer of group g is "thing g"."""
    rows = []
    for group in range(start, start + groups):
        texts = [f"thing {group}", *(f"other {group}{LETTERS[place]}" for place in range(1, options))]
        rows += [question_row(group, texts, 0, rotation) for rotation in range(options)]
    return rows


class FakeAnswerer:
    """Answers by a function of the question; opens images as a model would."""

    def __init__(self, respond: Callable[[Question], str], fingerprint: str = "sha256:fake", **settings: str | int):
        self.respond = respond
        self.fingerprint = fingerprint
        self.settings = dict(settings)
        self.device = "fake"
        self.batches: list[list[str]] = []

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.batches.append([question.id for question in questions])
        answers = []
        for question in questions:
            try:
                for image in question.images:
                    image.open()
            except ValueError as error:
                answers.append(Answer(question.prompt, "", error=str(error)))
            else:
                answers.append(Answer(question.prompt, self.respond(question)))
        return answers

    @property
    def asked(self) -> list[str]:
        return [name for batch in self.batches for name in batch]


def knows(question: Question) -> str:
    """Always right."""
    assert question.answer is not None
    return question.answer


def always_a(question: Question) -> str:
    """Always A: right in exactly one rotation of each question."""
    return "A"
