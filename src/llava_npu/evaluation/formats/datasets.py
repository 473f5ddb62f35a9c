"""From a benchmark and a path to its questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import Benchmark
from llava_npu.evaluation.formats.locating import check_images, find_data
from llava_npu.evaluation.questions import Dataset


def read_dataset(benchmark: Benchmark, data: Path) -> Dataset:
    """Finds and reads a benchmark's data.

    Args:
        benchmark: the benchmark.
        data: its file, or a folder that holds it under a name of `Benchmark.files`.

    Raises:
        UserError: not found, bad data, no question in it, or none of its images is there.
    """
    dataset = benchmark.read(find_data(benchmark.name, benchmark.files, data))
    if not dataset.questions:
        raise UserError(f"{dataset.path} holds no question of {benchmark.title}.")
    check_images(dataset)
    return replace(dataset, notes=(*dataset.notes, *_blind_notes(dataset)))


def _blind_notes(dataset: Dataset) -> list[str]:
    blind = sum(not question.images for question in dataset.questions)
    return [f"{blind} of {len(dataset.questions)} questions have no image: asked in text alone."] if blind else []
