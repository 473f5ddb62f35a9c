"""The types that flow through an evaluation: dataset → questions → answers → predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from llava_npu.data.image_sources import ImageSource


@dataclass(frozen=True)
class Question:
    """One question as it is put to a model.

    Attributes:
        id: unique in its dataset.
        text: the question alone (with its hint), without options and instructions: what an answer in free words is
            scored under.
        prompt: the whole prompt, options and answer instruction included, without the image placeholder.
        images: its images, in order; empty for a question in text alone.
        options: letter → text; empty for an open question.
        answer: the right letter (or text, for an open question); None where the benchmark keeps it secret.
        references: all right answers, or what all annotators answered, for an open question; empty where secret.
        group: questions of one group are one unit when scored (the rotations of a circular evaluation) and resampled.
        rotation: how many places the options are rotated against the group's first question.
        category, l2_category, split: the benchmark's own labels; "" where it has none.
        facts: what else the benchmark's scores or its submission file need of the record, by its own names.
        defect: why no model can be asked this; "" normally. Such a question counts as wrong.
    """

    id: str
    text: str
    prompt: str
    images: tuple[ImageSource, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    answer: str | None = None
    references: tuple[str, ...] = ()
    group: str = ""
    rotation: int = 0
    category: str = ""
    l2_category: str = ""
    split: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    defect: str = ""

    @property
    def concept(self) -> str:
        """What the image is asked to show: the right option's text, or the answer, or (if secret) the group."""
        if self.answer is None:
            return f"group {self.group}"
        return self.options.get(self.answer, self.answer).strip().casefold()


@dataclass(frozen=True)
class Dataset:
    """A benchmark file, read and checked.

    Attributes:
        path: the file.
        sha256: of its bytes; with separate annotation files, of all their checksums.
        questions: in the file's order.
        notes: what a reader of the scores should know about the file.
    """

    path: Path
    sha256: str
    questions: tuple[Question, ...]
    notes: tuple[str, ...] = ()

    def map(self, change: Callable[[Question], Question]) -> Dataset:
        """The same with every question changed."""
        return replace(self, questions=tuple(map(change, self.questions)))


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        prompt: the text that it was given, image placeholders included.
        text: its answer, unprocessed.
        error: why an answer is missing (an unreadable image); such a question counts as wrong.
        scores: log-probability of each option, where the answer was chosen by likelihood.
    """

    prompt: str
    text: str
    error: str | None = None
    scores: Mapping[str, float] | None = None


class Answerer(Protocol):
    """Whatever can answer a batch of questions: a model, an API, a test's fake.

    `fingerprint` names the exact model; `settings` everything else that an answer depends on. A run resumes only if
    both are what they were. `device` is for the record. If there are `notes`, the report has them too.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, str | int | float | bool | None]: ...

    @property
    def device(self) -> str: ...

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer for each question, in order."""
