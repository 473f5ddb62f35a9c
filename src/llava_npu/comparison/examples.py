"""The images that a page shows with every model's answer, whatever was answered to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_npu.config.comparison import BenchmarkConfig
from llava_npu.data.image_sources import UnreadableImageError
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import get
from llava_npu.evaluation.formats.datasets import read_dataset
from llava_npu.evaluation.questions import Question
from llava_npu.files.pages import data_url

_SIZE = (320, 320)  # at most; a page holds its images itself


@dataclass(frozen=True)
class ExampleQuestion:
    """A question as the page shows it.

    Attributes:
        id: of the question.
        image: a data URL.
        question, options: as asked.
        right: the right option's letter, or the right answer.
    """

    id: str
    image: str
    question: str
    options: dict[str, str]
    right: str | None


def example_questions(benchmark: BenchmarkConfig, count: int) -> list[Question]:
    """Questions with images at even distances through the benchmark."""
    dataset = read_dataset(get(benchmark.name), Path(benchmark.data))
    seen = [question for question in dataset.questions if question.images and not question.rotation]
    count = min(count, len(seen))
    return [seen[place * len(seen) // count] for place in range(count)]


def load_examples(benchmark: BenchmarkConfig, count: int) -> list[ExampleQuestion]:
    """The same with their images; nothing where the benchmark's data has gone."""
    try:
        questions: Sequence[Question] = example_questions(benchmark, count)
    except UserError:
        return []
    examples = []
    for question in questions:
        try:
            image = data_url(question.images[0].open(), _SIZE, quality=82)
        except UnreadableImageError:
            continue
        examples.append(ExampleQuestion(question.id, image, question.text, dict(question.options), question.answer))
    return examples
