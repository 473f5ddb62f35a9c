"""The benchmarks, one file each.

A file describes its benchmark (how its data is read, how an answer is parsed, how parsed answers are scored) and calls
`register`. Every file of this folder is imported when the registry is first asked, so a new benchmark needs no other
change.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llava_npu.errors import UserError, nearest
from llava_npu.evaluation.accuracy import Score
from llava_npu.evaluation.questions import Dataset, Question

Parsed = dict[str, str | None]  # extraction rule → what it read from an answer


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: as given on the command line.
        title: for people.
        data: where its data comes from, and in which form it is read.
        metric: what is scored, and where.
        read: file → questions.
        parse: a question and a model's answer → what each extraction rule reads from it.
        score: questions and, by question id, their parsed answers → scores.
        review: the same → what a reader of the scores should know.
        max_new_tokens: for generated answers.
    """

    name: str
    title: str
    data: str
    metric: str
    read: Callable[[Path], Dataset]
    parse: Callable[[Question, str], Parsed]
    score: Callable[[Sequence[Question], Mapping[str, Parsed]], list[Score]]
    review: Callable[[Sequence[Question], Mapping[str, Parsed]], list[str]]
    max_new_tokens: int


_REGISTRY: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> Benchmark:
    """Makes a benchmark known by its name."""
    if benchmark.name in _REGISTRY:
        raise ValueError(f"benchmark {benchmark.name!r} is registered twice")
    _REGISTRY[benchmark.name] = benchmark
    return benchmark


def available() -> dict[str, Benchmark]:
    """All benchmarks, by name."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get(name: str) -> Benchmark:
    """The benchmark of that name, or `UserError`."""
    known = available()
    if name not in known:
        raise UserError(f"benchmark {name!r} is unknown.{nearest(name, known)} Known: {', '.join(known)}.")
    return known[name]
