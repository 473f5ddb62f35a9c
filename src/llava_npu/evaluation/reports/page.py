"""The questions of a run, or of several side by side, as one web page to look through.

One file: images, data and script are in it, and it loads nothing. Every question shows its image, text, options,
what each model answered and how each rule read it; they can be filtered by category, by right and wrong, and by words.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llava_npu.data.image_sources import ImageSource, UnreadableImageError
from llava_npu.evaluation.benchmarks import Benchmark
from llava_npu.evaluation.predictions import Prediction
from llava_npu.evaluation.questions import Question
from llava_npu.files.atomic import write_text
from llava_npu.files.pages import data_url, render_page
from llava_npu.files.tables import TextTable

MOST_QUESTIONS = 6000  # a browser holds more, but few people's patience does
THUMBNAIL, LARGE_THUMBNAIL = (320, 320), (640, 640)  # pixels at most; large ones show what small print says
MAX_LARGE_THUMBNAILS = 300  # up to which they are large
MAX_THUMBNAIL_BYTES = 40 * 2**20  # of all images in a page, encoded


@dataclass(frozen=True)
class PageRun:
    """A run as the page shows it.

    Attributes:
        label: its name.
        predictions: question id → prediction, a judge's readings included.
    """

    label: str
    predictions: Mapping[str, Prediction]


@dataclass(frozen=True)
class QuestionsPage:
    """What a page shows.

    Attributes:
        title: of the page.
        notes: what a reader of the scores should know.
        scores: tables of them by what they are called while folded away, "" for one that is open; empty ones are left
            out.
        benchmark: says what an answer is worth.
        questions: as the models were asked.
        runs: their answers.
    """

    title: str
    notes: Sequence[str]
    scores: Mapping[str, TextTable]
    benchmark: Benchmark
    questions: Sequence[Question]
    runs: Sequence[PageRun]


def write_page(path: Path, page: QuestionsPage) -> None:
    """Writes the page, whole or not at all. What is too much for one page is left out, and the page says so."""
    shown = _spread(page.questions, MOST_QUESTIONS)
    distinct = {image.key for question in shown for image in question.images}
    images = _Thumbnails(THUMBNAIL if len(distinct) > MAX_LARGE_THUMBNAILS else LARGE_THUMBNAIL)
    cases = [_case(page.benchmark, question, page.runs, images) for question in shown]
    more = []
    if len(shown) < len(page.questions):
        more.append(f"{path.name} shows {len(shown)} of {len(page.questions)} questions, evenly spread.")
    if images.left_out:
        more.append(f"{path.name} leaves out {images.left_out} images, to stay small.")
    read = {rule for case in cases for answer in case["answers"] if answer is not None for rule in answer["read"]}
    data = {
        "title": page.title,
        "notes": [*page.notes, *more],
        "scores": [{**asdict(table), "folded": folded} for folded, table in page.scores.items() if table.rows],
        "runs": [run.label for run in page.runs],
        "rules": [rule for rule in page.benchmark.rules if rule in read],
        "images": images.encoded,
        "cases": cases,
    }
    write_text(path, _render(page.title, data))


def _case(benchmark: Benchmark, question: Question, runs: Sequence[PageRun], images: _Thumbnails) -> dict[str, Any]:
    return {
        "id": question.id,
        "group": question.group,
        "rotation": question.rotation,
        "split": question.split,
        "l2": question.l2_category,
        "category": question.category,
        "text": question.text,
        "options": dict(question.options),
        "truth": question.answer,
        "references": Counter(question.references).most_common(),
        "images": [images.place(image) for image in question.images],
        "answers": [_answer(benchmark, question, run.predictions.get(question.id)) for run in runs],
    }


def _answer(benchmark: Benchmark, question: Question, prediction: Prediction | None) -> dict[str, Any] | None:
    if prediction is None:
        return None
    return {
        "text": prediction.answer,
        "error": prediction.error,
        "prompt": prediction.prompt,
        "read": prediction.parsed,
        "credit": {rule: benchmark.credit(question, rule, reading) for rule, reading in prediction.parsed.items()},
    }


class _Thumbnails:
    """Thumbnails, each kept once."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._most = size
        self.encoded: list[str] = []
        self.left_out = 0
        self._places: dict[str, int | None] = {}
        self._size = 0

    def place(self, image: ImageSource) -> int | None:
        """Where it is in `encoded`; None if it cannot be read or no room is left."""
        if image.key not in self._places:
            self._places[image.key] = self._add(image)
        return self._places[image.key]

    def _add(self, image: ImageSource) -> int | None:
        if self._size > MAX_THUMBNAIL_BYTES:
            self.left_out += 1
            return None
        try:
            opened = image.open()
        except UnreadableImageError:  # it is in the predictions and the notes
            return None
        text = data_url(opened, self._most, quality=75)
        self._size += len(text)
        self.encoded.append(text)
        return len(self.encoded) - 1


def _spread(questions: Sequence[Question], most: int) -> Sequence[Question]:
    if len(questions) <= most:
        return questions
    return [questions[place * len(questions) // most] for place in range(most)]


def _render(title: str, data: Mapping[str, Any]) -> str:
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    # Within a script element only "<" could end it, or begin a comment.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {"data": Markup(text), "script": Markup(script), "script_hash": Markup(digest)}
    return render_page(Path(__file__).parent, "page.html", title=title, **values)
