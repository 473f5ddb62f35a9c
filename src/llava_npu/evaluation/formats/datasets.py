"""From a benchmark and a path to its questions; and whether the file is a published one."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

from llava_npu.data.conversation.turns import IMAGE_MARK
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import Benchmark
from llava_npu.evaluation.formats.locating import check_images, find_data
from llava_npu.evaluation.questions import Dataset, Question

_SURROGATE = re.compile("[\ud800-\udfff]")
_HASHED_AT_ONCE = 2**20  # bytes


def read_dataset(benchmark: Benchmark, data: Path) -> Dataset:
    """Finds and reads a benchmark's data.

    Args:
        benchmark: the benchmark.
        data: its file, or a folder that holds it under a name of `Benchmark.files`.

    Raises:
        UserError: not found, bad data, no question in it that can be asked, or none of its images is there.
    """
    dataset = benchmark.read(find_data(benchmark.name, benchmark.files, data))
    if not dataset.questions:
        raise UserError(f"{dataset.path} holds no question of {benchmark.title}.")
    check_images(dataset)
    dataset = _told_apart(dataset.map(_without_marks).map(_with_whole_characters))
    if all(question.defect for question in dataset.questions):
        first = dataset.questions[0]
        raise UserError(f"{dataset.path}: no question can be asked. The first, {first.id}: {first.defect}.")
    return replace(dataset, notes=(*dataset.notes, *_blind_notes(dataset)))


def _told_apart(dataset: Dataset) -> Dataset:
    """With an id for each question: answers are kept by it. The second of an id becomes ID#2."""
    seen: Counter[str] = Counter()
    taken = {question.id for question in dataset.questions}
    questions = []
    for question in dataset.questions:
        seen[question.id] += 1
        if (number := seen[question.id]) > 1:
            name = next(name for each in count(number) if (name := f"{question.id}#{each}") not in taken)
            taken.add(name)
            question = replace(question, id=name, group=name if question.group == question.id else question.group)
        questions.append(question)
    twice = [name for name, number in seen.items() if number > 1]
    if not twice:
        return dataset
    note = (
        f"{len(twice)} ids stand for several questions (first: {twice[0]}); all are asked, as {twice[0]}#2 and so on."
    )
    return replace(dataset, questions=tuple(questions), notes=(*dataset.notes, note))


def _without_marks(question: Question) -> Question:
    """The question, with a defect if its text holds marks for images of its own: `answering` puts them there."""
    if question.defect or not any(IMAGE_MARK in text for text in (question.prompt, question.text)):
        return question
    defect = f"its text contains {IMAGE_MARK!r}, which stands for an image and is put there for each of its images"
    return replace(question, defect=defect)


def _with_whole_characters(question: Question) -> Question:
    """The question as it can be written to any file; with a defect if its prompt had half a character."""
    if not any(map(_SURROGATE.search, _texts(question))):
        return question
    half = _SURROGATE.search(question.prompt)
    defect = f"its text holds half of a surrogate pair ({half[0].encode('unicode_escape').decode()})" if half else ""
    return replace(
        question,
        id=_whole(question.id),
        group=_whole(question.group),
        prompt=_whole(question.prompt),
        text=_whole(question.text),
        category=_whole(question.category),
        l2_category=_whole(question.l2_category),
        split=_whole(question.split),
        answer=None if question.answer is None else _whole(question.answer),
        references=tuple(map(_whole, question.references)),
        options={letter: _whole(text) for letter, text in question.options.items()},
        facts={name: _whole(text) for name, text in question.facts.items()},
        defect=question.defect or defect,
    )


def _texts(question: Question) -> Iterator[str]:
    yield from (question.id, question.group, question.prompt, question.text, question.answer or "")
    yield from (question.category, question.l2_category, question.split)
    yield from (*question.references, *question.options.values(), *question.facts.values())


def _whole(text: str) -> str:
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def _blind_notes(dataset: Dataset) -> list[str]:
    without_image = sum(not question.images for question in dataset.questions)
    return (
        [f"{without_image} of {len(dataset.questions)} questions have no image: asked in text alone."]
        if without_image
        else []
    )


def checksum_notes(benchmark: Benchmark, path: Path) -> list[str]:
    """Which published file this is, if it is one whose MD5 is known."""
    if not benchmark.checksums or path.suffix != ".tsv":  # only VLMEvalKit's tables have published sums
        return []
    return [checksum_note(path, md5_of(path), benchmark.checksums)]


def md5_of(path: Path) -> str:
    """A file's MD5: what publishers of benchmarks give. (It tells files apart; it proves nothing about an attacker.)"""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_note(path: Path, md5: str, known: Mapping[str, str]) -> str:
    """Which published file it is, if any.

    Args:
        path: the file.
        md5: its MD5.
        known: published file → MD5.
    """
    same = [name for name, published in known.items() if published == md5]
    if same:
        return f"Data: the published {same[0]} (MD5 {md5})."
    if path.name in known:
        return (
            f"Data: {path.name} has the MD5 {md5}, not {known[path.name]} as published. It was changed, or is another "
            "release: scores may not be comparable."
        )
    return f"Data: MD5 {md5}, which is none of the published files ({', '.join(known)})."
