"""The demo's data folder, in the forms that a user's own data has: LLaVA JSON to train on, MMBench-form TSV to test on.

data/
  images/                    224-pixel pictures on white
  align.json                 captions, template `plain`
  finetune.json              conversations, the language model's own chat template
  held_out_captions.json     captions of the held-out concepts, to measure the loss
  benchmark.tsv              multiple choice with all circular rotations
  benchmark-unrotated.tsv    the same questions once
  split.json                 what was held out, and how much there is of everything
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.conversations import caption_records, conversation_records, shape_captions
from demo.pictures import Picture, load_square
from demo.questions import concept_questions, shape_questions, write_benchmark
from demo.shapes import Shape
from demo.split import hold_out
from llava_npu.files.cache import build_once

SIDE = 224  # pixels of the prepared pictures


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        held_out: concepts held out, each asked about once.
        train_pictures: at most so many of the others are used.
        train_shapes: coloured shapes in training.
        shape_questions: test questions of each kind (colour, shape).
        conversations: to tune on.
        by_letter: half of the conversations are multiple choice, to be answered with a letter.
    """

    held_out: int
    train_pictures: int
    train_shapes: int
    shape_questions: int
    conversations: int
    by_letter: bool = False


@dataclass(frozen=True)
class DemoData:
    """The files of a data folder, and its questions."""

    folder: Path

    @property
    def align(self) -> Path:
        return self.folder / "align.json"

    @property
    def finetune(self) -> Path:
        return self.folder / "finetune.json"

    @property
    def held_out_captions(self) -> Path:
        return self.folder / "held_out_captions.json"

    @property
    def benchmark(self) -> Path:
        return self.folder / "benchmark.tsv"

    @property
    def unrotated(self) -> Path:
        return self.folder / "benchmark-unrotated.tsv"

    @property
    def split(self) -> Path:
        return self.folder / "split.json"


def build_data(
    folder: Path,
    pictures: Sequence[Picture],
    train_shapes: Sequence[Shape],
    test_shapes: Sequence[Shape],
    sizes: Sizes,
    seed: int,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> DemoData:
    """Writes the data folder, if it is not there; a pure function of its arguments.

    Args:
        folder: where to; complete or absent, never half.
        pictures: all captioned pictures.
        train_shapes, test_shapes: easy-VQA's own splits.
        sizes, seed: how much, and which.
        on_image: told how many pictures are prepared, of how many.
    """
    build_once(folder, lambda target: _build(target, pictures, train_shapes, test_shapes, sizes, seed, on_image))
    return DemoData(folder)


def _build(
    target: Path,
    pictures: Sequence[Picture],
    train_shapes: Sequence[Shape],
    test_shapes: Sequence[Shape],
    sizes: Sizes,
    seed: int,
    on_image: Callable[[int, int], None],
) -> None:
    split = hold_out(pictures, sizes.held_out, seed)
    train = _spread(split.train, sizes.train_pictures)
    shapes = train_shapes[: sizes.train_shapes]
    asked_shapes = test_shapes[: 20 * sizes.shape_questions]
    sources = {each.key: each.path for each in (*train, *(held.picture for held in split.held_out))}
    shape_sources = {shape.key: shape.path for shape in (*shapes, *asked_shapes)}

    images = {key: Path("images", f"{key}.png") for key in (*sources, *shape_sources)}
    full = {key: target / path for key, path in images.items()}
    questions = [
        *concept_questions(split.held_out, full, seed),
        *shape_questions(asked_shapes, full, sizes.shape_questions, seed),
    ]
    used = {*sources, *(shape.key for shape in shapes)}
    asked = {question.image for question in questions}
    needed = [key for key in images if key in used or full[key] in asked]
    for done, key in enumerate(needed, start=1):
        full[key].parent.mkdir(parents=True, exist_ok=True)
        load_square(sources.get(key) or shape_sources[key], SIDE, margin=key in sources).save(full[key])
        on_image(done, len(needed))

    captions = [(picture.key, images[picture.key], picture.caption) for picture in train]
    held_out = [(held.picture.key, images[held.picture.key], held.caption) for held in split.held_out]
    align = caption_records([*captions, *shape_captions(shapes, images)])
    finetune = conversation_records(train, shapes, images, sizes.conversations, sizes.by_letter, seed)
    _write_json(target / "align.json", align)
    _write_json(target / "finetune.json", finetune)
    _write_json(target / "held_out_captions.json", caption_records(held_out))
    write_benchmark(target / "benchmark.tsv", questions, rotations=True)
    write_benchmark(target / "benchmark-unrotated.tsv", questions, rotations=False)
    _write_json(
        target / "split.json",
        {
            "seed": seed,
            "sizes": asdict(sizes),
            "held_out": {held.name: held.picture.key for held in split.held_out},
            "pictures_by_source": Counter(picture.source for picture in train),
            "held_out_by_source": Counter(held.picture.source for held in split.held_out),
            "left_out_of_training": len(pictures) - len(split.train) - len(split.held_out),
            "captions": len(align),
            "conversations": len(finetune),
            "questions": Counter(question.part for question in questions),
        },
    )


def _spread(pictures: Sequence[Picture], count: int) -> Sequence[Picture]:
    """`count` pictures at even distances, so that every source and topic keeps its share."""
    if count >= len(pictures):
        return pictures
    return [pictures[place * len(pictures) // count] for place in range(count)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
