"""The same questions without their image, or with a wrong one: what a model scores without seeing.

A benchmark that a blind model answers well measures the language model (Goyal et al. 2017, arXiv:1612.00837; Chen et
al. 2024, MMStar, arXiv:2403.20330). So a score is worth the distance to these two baselines.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from llava_npu.errors import UserError, nearest
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.statistics.accuracy import group_questions

GIVEN, NONE, SHUFFLED = "given", "none", "shuffled"
IMAGE_MODES = (GIVEN, NONE, SHUFFLED)
SEED = 20240913


def with_images(questions: Sequence[Question], mode: str) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions as a model gets them: images as given, none, or another question's.

    Under "shuffled" every group gets the images of a group with another concept (answer) and another image, each
    group's images are used once, and the rotations of a question keep one image. The same questions always get the
    same wrong images.

    Returns:
        the questions in their order, and notes on what could not be had.
    """
    if mode == GIVEN:
        return tuple(questions), ()
    if mode == NONE:
        return tuple(replace(question, images=()) for question in questions), ()
    if mode == SHUFFLED:
        return _shuffled(questions)
    raise unknown_mode(mode)


def unknown_mode(mode: str) -> UserError:
    """The error for an image mode that does not exist."""
    return UserError(f"images: {mode!r} is unknown.{nearest(mode, IMAGE_MODES)} Known: {', '.join(IMAGE_MODES)}.")


def wrong_partners(concepts: Sequence[str], keys: Sequence[object]) -> list[int]:
    """For each item the index of another item: a permutation in which concepts and keys differ as far as possible.

    Sorted by concept, all items are shifted by the size of the largest concept, so that nobody lands in his own
    concept if that is possible at all (no concept has more than half of the items).
    """
    count = len(concepts)
    order = list(range(count))
    random.Random(SEED).shuffle(order)
    sizes = Counter(concepts)
    first_seen = {concepts[item]: place for place, item in reversed(list(enumerate(order)))}
    order.sort(key=lambda item: first_seen[concepts[item]])  # stable: random order of concepts, and within each
    largest = max(sizes.values(), default=0)

    def clashes(shift: int) -> int:
        pairs = [(item, order[(place + shift) % count]) for place, item in enumerate(order)]
        # Same image is worse than same concept: the image would not be wrong at all.
        return sum((concepts[a] == concepts[b]) + count * (keys[a] == keys[b]) for a, b in pairs)

    shifts = [*range(largest, count), *range(1, min(largest, count))]
    best = 0
    fewest: int | None = None
    for shift in shifts:
        found = clashes(shift)
        if fewest is None or found < fewest:
            best, fewest = shift, found
        if not fewest:
            break
    partners = [0] * count
    for place, item in enumerate(order):
        partners[item] = order[(place + best) % count]
    return partners


def _shuffled(questions: Sequence[Question]) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    seeing = [group for group in group_questions(questions) if group[0].images]
    if len(seeing) < 2:
        raise UserError("images 'shuffled' needs at least two questions with an image.")
    keys = [tuple(image.key for image in group[0].images) for group in seeing]
    concepts = [group[0].concept for group in seeing]
    partners = wrong_partners(concepts, keys)
    images = {group[0].group: seeing[partner][0].images for group, partner in zip(seeing, partners, strict=True)}
    notes = []
    same_image = sum(keys[item] == keys[partner] for item, partner in enumerate(partners))
    same_concept = sum(concepts[item] == concepts[partner] for item, partner in enumerate(partners))
    if same_image:
        notes.append(f"shuffled images: {same_image} of {len(seeing)} questions kept their own image.")
    if same_concept:
        notes.append(f"shuffled images: {same_concept} of {len(seeing)} questions got an image with the same answer.")
    shuffled = tuple(replace(question, images=images.get(question.group, ())) for question in questions)
    return shuffled, tuple(notes)
