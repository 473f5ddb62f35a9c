"""Multiple-choice questions, and the file that holds them in MMBench's form."""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.shapes import COLOURS, KINDS, Shape
from demo.split import HeldOut

WHAT = "What is in the picture?"
NUM_OPTIONS = 4
LETTERS = "ABCD"
ROTATION_STEP = 1_000_000  # index of a question's k-th rotation: index + k·10⁶
ASKED_OF_SHAPES = (("what color is the shape?", COLOURS), ("what shape is in the image?", KINDS))
CONCEPTS, SHAPES = "held-out concepts", "shapes (easy-VQA test)"


@dataclass(frozen=True)
class Choice:
    """A question with options, one of which is right.

    Attributes:
        image: file of the picture.
        question: text.
        options: as shown, in order.
        right: index into `options`.
        part: which part of the benchmark, "held-out concepts" or "shapes (easy-VQA test)".
        category: within the part.
    """

    image: Path
    question: str
    options: tuple[str, ...]
    right: int
    part: str
    category: str

    @property
    def letter(self) -> str:
        return LETTERS[self.right]


def concept_questions(held_out: Sequence[HeldOut], images: dict[str, Path], seed: int) -> list[Choice]:
    """One question for each held-out concept, all options from the held-out concepts.

    In a circle of all concepts in random order, each concept's wrong options are the next three: every concept is
    right once and wrong three times, and each letter is right equally often. So nothing but the picture tells: a
    model that always prefers the same concepts, or the same letter, is right in one of four.
    """
    rng = random.Random(seed)
    circle = list(held_out)
    rng.shuffle(circle)
    letters = [place % NUM_OPTIONS for place in range(len(circle))]
    rng.shuffle(letters)
    choices = []
    for place, (concept, right) in enumerate(zip(circle, letters, strict=True)):
        options = [circle[(place + step) % len(circle)].caption for step in range(1, NUM_OPTIONS)]
        rng.shuffle(options)
        options.insert(right, concept.caption)
        image = images[concept.picture.key]
        choices.append(Choice(image, WHAT, tuple(options), right, CONCEPTS, concept.picture.topic))
    return choices


def shape_questions(shapes: Sequence[Shape], images: dict[str, Path], count: int, seed: int) -> list[Choice]:
    """`count` questions about colour and as many about kind, each answer equally often right (as far as it goes)."""
    rng = random.Random(seed)
    found: list[Choice] = []
    for text, answers in ASKED_OF_SHAPES:
        category = "color" if answers is COLOURS else "kind"
        for shape in _balanced(shapes, answers, count, rng):
            right = shape.answer_among(answers)
            assert right is not None
            wrong = [answer for answer in answers if answer != right]
            options = rng.sample(wrong, min(NUM_OPTIONS - 1, len(wrong)))
            place = len(found) % (len(options) + 1)
            options.insert(place, right)
            found.append(Choice(images[shape.key], text, tuple(options), place, SHAPES, category))
    return found


def write_benchmark(path: Path, choices: Sequence[Choice], rotations: bool) -> None:
    """Writes the questions in MMBench's form.

    Args:
        path: a .tsv file.
        choices: the questions; each picture is embedded once, in the row of its first question.
        rotations: add each question's circular rotations, with index + k·10⁶.
    """
    table = io.StringIO()
    columns = ["index", "question", "hint", *LETTERS, "answer", "category", "l2-category", "image"]
    writer = csv.DictWriter(table, columns, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    rows_of_images: dict[Path, int] = {}
    for index, choice in enumerate(choices):
        for turn in range(len(choice.options) if rotations else 1):
            options = (*choice.options[turn:], *choice.options[:turn])
            row = rows_of_images.get(choice.image)
            rows_of_images.setdefault(choice.image, index)
            writer.writerow(
                {
                    "index": index + turn * ROTATION_STEP,
                    "question": choice.question,
                    "hint": "",
                    **dict(zip(LETTERS, options, strict=False)),
                    "answer": LETTERS[(choice.right - turn) % len(options)],
                    "category": f"{choice.part}: {choice.category}",
                    "l2-category": choice.part,
                    "image": base64.b64encode(choice.image.read_bytes()).decode() if row is None else row,
                }
            )
    path.write_text(table.getvalue(), encoding="utf-8")


def _balanced(shapes: Sequence[Shape], answers: tuple[str, ...], count: int, rng: random.Random) -> list[Shape]:
    """`count` shapes, as equally spread over the answers as they are."""
    shuffled = list(shapes)
    rng.shuffle(shuffled)
    groups = [[shape for shape in shuffled if shape.answer_among(answers) == answer] for answer in answers]
    rounds = [shape for of_round in zip(*groups, strict=False) for shape in of_round]
    return rounds[:count]
