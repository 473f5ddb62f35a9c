"""Training data in LLaVA's JSON form: captions to align the projector, conversations to tune the language model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from demo.concepts import nouns
from demo.pictures import Picture
from demo.questions import ASKED_OF_SHAPES, LETTERS, NUM_OPTIONS, WHAT
from demo.shapes import COLOURS, KINDS, Shape
from llava_npu.data.conversation.turns import IMAGE_MARK
from llava_npu.evaluation.extraction.choices import ENGLISH, build_prompt

Record = dict[str, Any]
_T = TypeVar("_T")

_ASKED = (
    WHAT,
    "What is this?",
    "What does the picture show?",
    "What can you see in the picture?",
    "Name what you see.",
)
_SHAPE_QUESTIONS = 4  # of one picture in one conversation


def caption_records(captions: Sequence[tuple[str, Path, str]]) -> list[Record]:
    """Pictures with their captions, for the template `plain`: (id, image path in the data folder, caption)."""
    return [_record(key, image, [(IMAGE_MARK, caption)]) for key, image, caption in captions]


def shape_captions(shapes: Sequence[Shape], images: dict[str, Path]) -> list[tuple[str, Path, str]]:
    """ "a red circle", for each shape of which the questions tell both."""
    described = [(shape, shape.answer_among(COLOURS), shape.answer_among(KINDS)) for shape in shapes]
    return [
        (shape.key, images[shape.key], f"a {colour} {kind}") for shape, colour, kind in described if colour and kind
    ]


def conversation_records(
    pictures: Sequence[Picture],
    shapes: Sequence[Shape],
    images: dict[str, Path],
    count: int,
    by_letter: bool,
    seed: int,
) -> list[Record]:
    """`count` conversations, a third of them about coloured shapes with several questions each.

    Args:
        pictures, shapes: what is asked about.
        images: key → image path in the data folder.
        count: how many conversations.
        by_letter: half of the conversations are multiple choice, to be answered with a letter. Such a question stands
            alone in its conversation: an answer before it would give it away.
        seed: of order and questions.
    """
    rng = random.Random(seed)
    order_of_pictures, order_of_shapes = _endless(pictures, rng), _endless(shapes, rng)
    captions = sorted({picture.caption for picture in pictures})
    records = []
    for number in range(count):
        choice = by_letter and number % 2 == 0
        if number % 6 in (1, 4):
            shape = next(order_of_shapes)
            key, turns = shape.key, (_shape_choice(shape, rng) if choice else _shape_questions(shape, rng))
        else:
            picture = next(order_of_pictures)
            key, turns = picture.key, (_choice(picture, captions, rng) if choice else _caption_question(picture, rng))
        turns[0] = (f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1])
        records.append(_record(f"{key}#{number}", images[key], turns))
    return records


def _choice(picture: Picture, captions: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    right = picture.caption
    options = [right, *_other_captions(right, captions, rng)]
    rng.shuffle(options)
    prompt = build_prompt(WHAT, dict(zip(LETTERS, options, strict=True)), ENGLISH)
    return [(prompt, LETTERS[options.index(right)])]


def _other_captions(right: str, captions: Sequence[str], rng: random.Random) -> list[str]:
    """Wrong options that share no noun with the right one or with each other."""
    used = set(nouns(right)) or {right}
    found: list[str] = []
    while len(found) < NUM_OPTIONS - 1:
        caption = rng.choice(captions)
        if used.isdisjoint(nouns(caption)) and caption not in (right, *found):
            found.append(caption)
            used.update(nouns(caption))
    return found


def _caption_question(picture: Picture, rng: random.Random) -> list[tuple[str, str]]:
    return [(rng.choice(_ASKED), picture.caption)]


def _shape_questions(shape: Shape, rng: random.Random) -> list[tuple[str, str]]:
    """Colour and kind first, as far as the set tells them: its other questions give them away ("is there a red …?")."""
    asked = [(text, shape.answer_among(answers)) for text, answers in ASKED_OF_SHAPES]
    first = [(text, answer) for text, answer in asked if answer is not None]
    rng.shuffle(first)
    others = [(text, answer) for text, answer in shape.questions if answer in ("yes", "no")]
    return [*first, *rng.sample(others, min(_SHAPE_QUESTIONS - len(first), len(others)))]


def _shape_choice(shape: Shape, rng: random.Random) -> list[tuple[str, str]]:
    """Multiple choice about colour or kind, if the set's questions tell it."""
    known = [(text, answers) for text, answers in ASKED_OF_SHAPES if shape.answer_among(answers)]
    if not known:
        return _shape_questions(shape, rng)
    text, answers = rng.choice(known)
    right = shape.answer_among(answers)
    assert right is not None
    wrong = [answer for answer in answers if answer != right]
    options = [right, *rng.sample(wrong, min(NUM_OPTIONS - 1, len(wrong)))]
    rng.shuffle(options)
    prompt = build_prompt(text, dict(zip(LETTERS, options, strict=False)), ENGLISH)
    return [(prompt, LETTERS[options.index(right)])]


def _endless(items: Sequence[_T], rng: random.Random) -> Iterator[_T]:
    """The items in a new random order each time round."""
    while True:
        order = list(items)
        rng.shuffle(order)
        yield from order


def _record(key: str, image: Path, turns: Sequence[tuple[str, str]]) -> Record:
    conversations = [
        {"from": role, "value": text}
        for question, answer in turns
        for role, text in (("human", question), ("gpt", answer))
    ]
    return {"id": key, "image": image.as_posix(), "conversations": conversations}
