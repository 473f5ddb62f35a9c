"""Multiple-choice questions from tab-separated files in MMBench's form, which many benchmarks share.

Columns (VLMEvalKit, docs/en/Development.md; LLaVA's model_vqa_mmbench.py reads the same files):
    index       a whole number, unique. In a circular file the rotations of question g are g + k·10⁶.
    question    text.
    hint        text put before the question; may be empty.
    A, B, …     the options, from A on without a gap.
    answer      a letter; empty, or no such column, where it is secret.
    category, l2-category, split    labels; all may be absent.
    image       a picture in base64, or, in at most 64 characters, the index of the row that holds it.
    image_path  a picture file below the table's folder, where `image` is empty.

"nan", which pandas writes for an empty cell, is an empty cell here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_npu.data.records import IMAGE_MARK
from llava_npu.evaluation.accuracy import CIRCULAR, Score, group_questions, is_complete, score_choices
from llava_npu.evaluation.benchmarks import Parsed
from llava_npu.evaluation.extraction import EXTRACTORS
from llava_npu.evaluation.images import EmbeddedImage, ImageFile, ImageSource
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.tables import Row, Table, missing_column, read_tsv

ROTATION_STEP = 1_000_000
_MAX_REFERENCE = 64  # characters; a longer `image` is a picture
_MAX_NOTED = 10  # groups named in a note

ENGLISH = "Answer with the option's letter from the given choices directly."
CHINESE = "请直接回答选项字母。"


def read_choices(path: Path, *, instruction: str, circular: bool) -> Dataset:
    """Reads and checks a file of multiple-choice questions.

    Args:
        path: the .tsv file.
        instruction: the prompt's last line.
        circular: whether an index beyond 10⁶ means a rotation; if not, every row is a question of its own.

    Raises:
        UserError: anything wrong with the file, naming row and column. (A picture that is missing, or is valid base64
            but cannot be decoded, is no error here: such questions count as wrong when they are asked.)
    """
    table = read_tsv(path, required=("index", "question", "A", "B"))
    if not {"image", "image_path"} & set(table.columns):
        raise missing_column(path, table.columns, "image", "image_path")
    indices = _indices(table)
    images = _Images(table, indices)
    questions = tuple(
        _question(row, index, images.of(row), instruction, circular)
        for row, index in zip(table.rows, indices, strict=True)
    )
    return Dataset(path, table.sha256, questions, tuple(_notes(questions, circular)))


def build_prompt(text: str, options: Mapping[str, str], instruction: str) -> str:
    """LLaVA's prompt: (hint and) question, one option a line, the instruction."""
    return "\n".join([text, *(f"{letter}. {option}" for letter, option in options.items()), instruction])


def parse_choice(question: Question, answer: str) -> Parsed:
    """What each extraction rule reads from an answer."""
    return {name: extract(answer, question.options) for name, extract in EXTRACTORS.items()}


def score_circular(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    """Circular, vanilla and row-wise accuracy; only row-wise where the file has no rotations at all."""
    return _score(questions, parsed, circular=any(question.rotation for question in questions))


def score_vanilla(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[Score]:
    """Accuracy of each row on its own."""
    return _score(questions, parsed, circular=False)


def review_circular(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    """What guessing would score, and what incomplete groups would do to a suite that does not look for them."""
    groups = [group for group in group_questions(questions) if group[0].answer is not None]
    if not groups or not any(question.rotation for question in questions):
        return review_vanilla(questions, parsed)
    by_chance = sum((1 / len(group[0].options)) ** len(group) for group in groups if is_complete(group)) / len(groups)
    notes = [*review_vanilla(questions, parsed), f"Guessing would score {by_chance:.1%} in the circular score."]
    incomplete = sum(not is_complete(group) for group in groups)
    with_first = [group for group in groups if group[0].rotation == 0]  # what VLMEvalKit counts
    if not incomplete or not with_first:
        return notes
    for name in EXTRACTORS:
        hits = sum(all(_parsed(parsed, each, name) == each.answer for each in group) for group in with_first)
        notes.append(
            f"{CIRCULAR}, {name}: a suite that scores whatever rotations are there would report "
            f"{hits / len(with_first):.1%} over all splits; here incomplete groups ({incomplete}) count as wrong."
        )
    return notes


def review_vanilla(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    """What guessing would score."""
    first = [question for question in questions if question.rotation == 0 and question.answer is not None]
    if not first:
        return []
    by_chance = sum(1 / len(question.options) for question in first) / len(first)
    return [f"Guessing would score {by_chance:.1%} in the vanilla score."]


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed], circular: bool) -> list[Score]:
    return [
        score
        for name in EXTRACTORS
        for score in score_choices(
            questions, {question.id: _parsed(parsed, question, name) for question in questions}, name, circular
        )
    ]


def _parsed(parsed: Mapping[str, Parsed], question: Question, extraction: str) -> str | None:
    return parsed.get(question.id, {}).get(extraction)


# --- rows -------------------------------------------------------------------------------------------------------------


def _question(row: Row, index: int, images: tuple[ImageSource, ...], instruction: str, circular: bool) -> Question:
    text = _text(row, "question")
    if not text:
        raise row.error("question", "empty.")
    for column in ("hint", "question", *string.ascii_uppercase):
        if IMAGE_MARK in row.get(column):
            raise row.error(column, f"contains {IMAGE_MARK!r}, which stands for the picture; it is put there for you.")
    hint = _text(row, "hint")
    if hint and hint.strip().lower() != "none":
        text = f"{hint}\n{text}"
    options = _options(row)
    rotation, group = divmod(index, ROTATION_STEP) if circular else (0, index)
    return Question(
        id=str(index),
        text=text,
        prompt=build_prompt(text, options, instruction),
        images=images,
        options=options,
        answer=_answer(row, options),
        group=str(group),
        rotation=rotation,
        category=_cell(row, "category"),
        l2_category=_cell(row, "l2-category"),
        split=_cell(row, "split"),
    )


def _text(row: Row, column: str) -> str:
    # Not stripped: the prompt is the file's text to the last space, as in the original scripts.
    value = row.get(column)
    return "" if value.strip().lower() in ("", "nan") else value


def _cell(row: Row, column: str) -> str:
    return _text(row, column).strip()


def _indices(table: Table) -> list[int]:
    seen: dict[int, Row] = {}
    for row in table.rows:
        value = row.get("index").strip()
        if not (value.isascii() and value.isdigit()):
            raise row.error("index", f"{value!r} is not a whole number from 0 on.")
        index = int(value)
        if index in seen:
            first = seen[index]
            raise row.error("index", f"{index} is there twice: first in row {first.number} (line {first.line}).")
        seen[index] = row
    return list(seen)


def _options(row: Row) -> dict[str, str]:
    given = {letter: _text(row, letter) for letter in string.ascii_uppercase if letter in row.cells}
    options = {letter: text for letter, text in given.items() if text}
    if len(options) < 2:
        raise row.error("B" if "A" in options else "A", "empty; a question needs at least the options A and B.")
    for letter, expected in zip(options, string.ascii_uppercase, strict=False):
        if letter != expected:
            raise row.error(expected, f"empty, but option {letter} is given. Options run from A on without a gap.")
    return options


def _answer(row: Row, options: Mapping[str, str]) -> str | None:
    answer = _cell(row, "answer")
    if not answer:
        return None
    if answer not in options:
        raise row.error("answer", f"{answer[:60]!r} is none of this row's options ({', '.join(options)}).")
    return answer


class _Images:
    """The pictures of a table; equal ones are held once."""

    def __init__(self, table: Table, indices: Sequence[int]):
        self._by_index = dict(zip(indices, table.rows, strict=True))
        self._shared: dict[str, EmbeddedImage] = {}

    def of(self, row: Row) -> tuple[ImageSource, ...]:
        value = _cell(row, "image")
        if not value:
            return self._from_path(row)
        if len(value) <= _MAX_REFERENCE:
            return (self._embedded(self._holder(row, value)),)
        return (self._embedded(row),)

    def _holder(self, row: Row, value: str) -> Row:
        holder = self._by_index.get(int(value)) if value.isascii() and value.isdigit() else None
        if holder is None:
            raise row.error("image", f"{value!r} is neither a picture in base64 nor the index of a row that holds one.")
        if len(_cell(holder, "image")) <= _MAX_REFERENCE:
            raise row.error("image", f"refers to row {holder.number} (index {value}), which holds no picture itself.")
        return holder

    def _embedded(self, row: Row) -> EmbeddedImage:
        try:
            data = base64.b64decode("".join(row.get("image").split()), validate=True)
        except binascii.Error as error:
            start = row.get("image")[:30]
            raise row.error("image", f"unreadable base64 ({error}); it starts with {start!r}.") from error
        key = hashlib.sha256(data).hexdigest()
        return self._shared.setdefault(key, EmbeddedImage(key, data, f"{row.file}, row {row.number}, column 'image'"))

    def _from_path(self, row: Row) -> tuple[ImageSource, ...]:
        value = _cell(row, "image_path")
        if not value:
            return ()
        if value.startswith("["):
            raise row.error("image_path", "several images in one question are not supported in this form.")
        root = row.file.parent.resolve()
        path = (root / value).resolve()
        if not path.is_relative_to(root):
            raise row.error("image_path", f"{value!r} leads out of the table's folder {root}.")
        return (ImageFile(path, f"{row.file}, row {row.number}, column 'image_path'"),)


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes(questions: Sequence[Question], circular: bool) -> list[str]:
    notes = []
    secret = sum(question.answer is None for question in questions)
    if secret:
        notes.append(f"{secret} of {len(questions)} rows have no answer (kept secret?): predicted, not scored.")
    blind = sum(not question.images for question in questions)
    if blind:
        notes.append(f"{blind} of {len(questions)} rows have no picture.")
    if circular:
        notes += _rotation_notes(questions)
    return notes


def _rotation_notes(questions: Sequence[Question]) -> list[str]:
    groups = group_questions(questions)
    if not any(question.rotation for question in questions):
        return ["The file has no rotations (no index of 10⁶ or more): no circular score."]
    notes = []
    incomplete = [group for group in groups if not is_complete(group)]
    if incomplete:
        shown = "; ".join(
            f"{group[0].group} has {len(group)} of {len(group[0].options)}" for group in incomplete[:_MAX_NOTED]
        )
        more = f"; and {len(incomplete) - _MAX_NOTED} more" if len(incomplete) > _MAX_NOTED else ""
        notes.append(
            f"{len(incomplete)} of {len(groups)} groups lack rotations and count as wrong in the circular score: "
            f"{shown}{more}."
        )
    mixed = [group[0].group for group in groups if len({question.text for question in group}) > 1]
    if mixed:
        notes.append(
            f"{len(mixed)} groups hold different questions under one index modulo 10⁶ (first: {mixed[0]}): if these "
            "are no rotations, use the benchmark multiple_choice."
        )
    return notes
