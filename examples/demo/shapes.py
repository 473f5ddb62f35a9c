"""easy-VQA: 64-pixel pictures of one coloured shape, with questions and answers, and a test split of its own.

Source: V. Zhou's easy-VQA, MIT licence.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Shape:
    """A picture with all its questions.

    Attributes:
        key: as in "shapes/train/17".
        path: of the file.
        questions: (question, answer), as in ("what color is the shape?", "red").
    """

    key: str
    path: Path
    questions: tuple[tuple[str, str], ...]

    def answer_among(self, answers: tuple[str, ...]) -> str | None:
        """The shape's colour or kind: what it answers where the answer is one of these."""
        return next((answer for _, answer in self.questions if answer in answers), None)


def shapes(package: Path, split: str) -> list[Shape]:
    """The pictures of a split ("train" or "test") in their order."""
    folder = package / "easy_vqa" / "data" / split
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        questions[image].append((question, answer))
    return [
        Shape(f"shapes/{split}/{image}", folder / "images" / f"{image}.png", tuple(questions[image]))
        for image in sorted(questions)
    ]
