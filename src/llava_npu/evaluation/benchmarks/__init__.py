"""The benchmarks, one file each.

A file describes its benchmark (how its data is read, how an answer is parsed, how parsed answers are scored) and calls
`register`. Every file of this folder is imported when the registry is first asked, so a new benchmark needs no other
change. `docs/evaluation.md` and `llava-npu eval --list` are made from the registrations.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from llava_npu.errors import UserError, nearest
from llava_npu.evaluation.judge.judging import JudgeRule
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.reports.submissions import Submission
from llava_npu.evaluation.statistics.accuracy import Score
from llava_npu.files.home import expand_home

Parsed = dict[str, str | None]  # extraction rule → what it read from an answer

LOCALLY, SERVER, JUDGE = "here", "by the benchmark's server", "by a judge model"
MAY_JUDGE = "a judge model may help"


@dataclass(frozen=True)
class Description:
    """What people need to know before they use a benchmark.

    Attributes:
        source: where the data comes from.
        form: which files are read, and their fields.
        licence: as its publishers state it.
        prompt: what the model is given. (It answers by greedy decoding, in at most `max_new_tokens`.)
        metric: what is computed.
        scored: where: one or more of `LOCALLY`, `SERVER`, `JUDGE`, `MAY_JUDGE`.
    """

    source: str
    form: str
    licence: str
    prompt: str
    metric: str
    scored: tuple[str, ...]


def right_or_wrong(question: Question, rule: str, reading: str | None) -> float | None:
    """Credit of most benchmarks: 1 if the answer was read as the right one, else 0; None where that is secret."""
    return None if question.answer is None else float(reading == question.answer)


def nothing_to_note(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    """No notes on the scores."""
    return []


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. `ChoiceBenchmark` and `OpenBenchmark` hold what many have in common.

    Attributes:
        name: as given on the command line.
        title: for people.
        description: for people.
        files: glob patterns that find the question file in a data folder, the preferred one first.
        read: file → questions.
        parse: a question and a model's answer → what each extraction rule reads from it.
        score: questions and, by question id, their parsed answers → scores.
        rules: extraction rule → what it is, in a few words.
        review: questions and their parsed answers → what a reader of the scores should know.
        max_new_tokens: for generated answers.
        credit: a question, a rule and its reading of an answer → what that is worth, 0 … 1; None where it is secret.
        checksums: published file → its MD5.
        submission: the files that a server or another tool takes.
        judging: what a judge model is asked.
        closed: what to do now that the benchmark's server takes no more submissions; "" if it does, or has none.
    """

    name: str
    title: str
    description: Description
    files: tuple[str, ...]
    read: Callable[[Path], Dataset]
    parse: Callable[[Question, str], Parsed]
    score: Callable[[Sequence[Question], Mapping[str, Parsed]], list[Score]]
    rules: Mapping[str, str]
    review: Callable[[Sequence[Question], Mapping[str, Parsed]], list[str]] = nothing_to_note
    max_new_tokens: int = 128
    checksums: Mapping[str, str] = field(default_factory=dict)
    submission: Submission | None = None
    judging: JudgeRule | None = None
    credit: Callable[[Question, str, str | None], float | None] = right_or_wrong
    closed: str = ""


_REGISTRY: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> Benchmark:
    """Makes a benchmark known by its name."""
    if benchmark.name in _REGISTRY:
        raise ValueError(f"benchmark {benchmark.name!r} is registered twice")
    _REGISTRY[benchmark.name] = benchmark
    return benchmark


def load_modules(names: Iterable[str]) -> None:
    """Imports modules that register benchmarks: Python files by path, others by name. Each is imported once.

    Raises:
        UserError: one cannot be imported, or registers nothing.
    """
    for name in names:
        before = set(available())
        key = f"llava_npu_benchmark_{Path(name).stem}" if name.endswith(".py") else name
        if key in sys.modules:
            continue
        try:
            if name.endswith(".py"):
                _import_file(key, expand_home(name))
            else:
                import_module(name)
        except Exception as error:
            sys.modules.pop(key, None)
            raise UserError(f"--benchmark-module {name} cannot be imported: {type(error).__name__}: {error}") from error
        if set(available()) == before:
            raise UserError(f"--benchmark-module {name} registers no benchmark: it has to call `register`.")


def _import_file(key: str, path: Path) -> None:
    spec = spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[key] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[key])


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
