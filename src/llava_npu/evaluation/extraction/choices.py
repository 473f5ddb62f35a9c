"""Multiple-choice questions from tab-separated files in MMBench's form, which many benchmarks share.

Columns (VLMEvalKit, docs/en/Development.md; LLaVA's model_vqa_mmbench.py reads the same files):
    index       unique. In a circular file a whole number: the rotations of question g are g + k·10⁶.
    question    text.
    hint        text put before the question; may be empty.
    A, B, …     the options, from A on without a gap.
    answer      a letter; empty, or no such column, where it is secret.
    category, l2-category, split    labels; all may be absent.
    image, image_path    see table_images.py.

"nan", which pandas writes for an empty cell, is an empty cell here.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_npu.evaluation.benchmarks import Benchmark, Parsed
from llava_npu.evaluation.extraction.rules import EXTRACTORS
from llava_npu.evaluation.formats.table_images import TableImages, table_question
from llava_npu.evaluation.formats.tables import Row, Table, read_tsv, unique_indices
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import (
    Score,
    extraction_rules,
    group_questions,
    is_complete,
    num_rotations,
    score_choices,
)

ROTATION_STEP = 1_000_000
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]*")
# What pandas takes for an empty cell; pandas.read_csv, na_values.
_NOTHING_TO_PANDAS = frozenset(
    ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "n/a", "null")
)
_MAX_NOTED = 10  # groups named in a note

ABOUT = {
    "strict": "ours: the option that the answer names, letters and texts as whole words",
    "vlmevalkit": "VLMEvalKit's rules, including their faults; use it to compare with published scores",
}

ENGLISH = "Answer with the option's letter from the given choices directly."
CHINESE = "请直接回答选项字母。"


def no_facts(row: Row) -> Mapping[str, str]:
    """Nothing of the row is needed besides its question."""
    return {}


@dataclass(frozen=True)
class ChoiceForm:
    """How a file of multiple-choice questions is read.

    Attributes:
        instruction: the prompt's last line.
        circular: whether an index beyond 10⁶ means a rotation; if not, every row is a question of its own.
        facts: row → what else its question keeps.
        open_instruction: the last line where a row has no options; None if every row must have them.
        skips_empty_options: whether an empty option before filled ones is left out, as VLMEvalKit does; else an error.
    """

    instruction: str = ENGLISH
    circular: bool = False
    facts: Callable[[Row], Mapping[str, str]] = no_facts
    open_instruction: str | None = None
    skips_empty_options: bool = False

    def last_line(self, options: Mapping[str, str]) -> str:
        """The instruction for a question with these options."""
        return self.open_instruction if self.open_instruction is not None and not options else self.instruction


def read_choices(path: Path, form: ChoiceForm = ChoiceForm()) -> Dataset:
    """Reads and checks a .tsv file of multiple-choice questions.

    Raises:
        UserError: anything wrong with the file, naming row and column. (An image that is missing, or is valid base64
            but cannot be decoded, is not an error here: such questions count as wrong when they are asked.)
    """
    table = read_tsv(path, required=("index", "question", "A", "B"))
    images = TableImages(table)
    indices = _indices(table) if form.circular else unique_indices(table)
    questions = tuple(_question(row, index, images, form) for row, index in zip(table.rows, indices, strict=True))
    return Dataset(path, table.sha256, questions, tuple(_notes(questions, form.circular)))


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
    return [*review_vanilla(questions, parsed), f"Guessing would score {by_chance:.1%} in the circular score."]


def review_vanilla(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    """What guessing would score."""
    first = [question for question in questions if question.rotation == 0 and question.answer is not None]
    if not first:
        return []
    by_chance = sum(1 / len(question.options) for question in first if question.options) / len(first)
    return [f"Guessing would score {by_chance:.1%} in the vanilla score."]


@dataclass(frozen=True)
class ChoiceBenchmark(Benchmark):
    """A benchmark of multiple-choice questions: by default in MMBench's form, each row scored on its own."""

    read: Callable[[Path], Dataset] = read_choices
    parse: Callable[[Question, str], Parsed] = parse_choice
    score: Callable[[Sequence[Question], Mapping[str, Parsed]], list[Score]] = score_vanilla
    rules: Mapping[str, str] = field(default_factory=lambda: ABOUT)
    review: Callable[[Sequence[Question], Mapping[str, Parsed]], list[str]] = review_vanilla


def _score(questions: Sequence[Question], parsed: Mapping[str, Parsed], circular: bool) -> list[Score]:
    return [
        score
        for rule in extraction_rules(parsed) or EXTRACTORS
        for score in score_choices(
            questions, {question.id: _parsed(parsed, question, rule) for question in questions}, rule, circular
        )
    ]


def _parsed(parsed: Mapping[str, Parsed], question: Question, extraction: str) -> str | None:
    return parsed.get(question.id, {}).get(extraction)


# --- rows -------------------------------------------------------------------------------------------------------------


def _question(row: Row, index: str, images: TableImages, form: ChoiceForm) -> Question:
    text, hint = row.text("question"), row.text("hint")
    if hint and hint.strip().lower() != "none":
        text = f"{hint}\n{text}"
    options = _options(row, form)
    rotation, group = divmod(int(index), ROTATION_STEP) if form.circular else (0, index)
    return table_question(
        row,
        images,
        id=index,
        text=text,
        prompt=build_prompt(text, options, form.last_line(options)),
        options=options,
        answer=_answer(row, options),
        group=str(group),
        rotation=rotation,
        facts=form.facts(row),
    )


def _indices(table: Table) -> list[str]:
    """Unique indices that are numbers, each written in one way only."""
    for row in table.rows:
        value = row.get("index").strip()
        if not _WHOLE_NUMBER.fullmatch(value):
            raise row.error("index", f"{value[:60]!r} is not a whole number from 0 on.")
    return unique_indices(table)


def _options(row: Row, form: ChoiceForm) -> dict[str, str]:
    given = {letter: row.text(letter) for letter in string.ascii_uppercase if letter in row.cells}
    options = {letter: text for letter, text in given.items() if text}
    if not options and form.open_instruction is not None:
        return {}
    if len(options) < 2:
        raise row.error("B" if "A" in options else "A", "empty; a question needs at least the options A and B.")
    if form.skips_empty_options:
        return options
    for letter, expected in zip(options, string.ascii_uppercase, strict=False):  # as many letters as there are options
        if letter != expected:
            raise row.error(expected, f"empty, but option {letter} is given. Options run from A on without a gap.")
    return options


def _answer(row: Row, options: Mapping[str, str]) -> str | None:
    answer = row.label("answer")
    if not answer:
        return None
    if options and answer not in options:
        raise row.error("answer", f"{answer[:60]!r} is none of this row's options ({', '.join(options)}).")
    return answer


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes(questions: Sequence[Question], circular: bool) -> list[str]:
    notes = []
    secret = sum(question.answer is None for question in questions)
    if secret:
        notes.append(f"{secret} of {len(questions)} rows have no answer (kept secret?): predicted, not scored.")
    dropped = [question for question in questions if any(map(_is_lost_in_pandas, question.options.values()))]
    if dropped:
        notes.append(
            f"{len(dropped)} rows have an option like “None” or “NA” (first: {dropped[0].id}). Here it is one; pandas, "
            "with which LLaVA's script and VLMEvalKit read the file, drops it: their prompts lack it."
        )
    if circular:
        notes += _rotation_notes(questions)
    return notes


def _is_lost_in_pandas(option: str) -> bool:
    return option in _NOTHING_TO_PANDAS or option.lower() == "none"


def _rotation_notes(questions: Sequence[Question]) -> list[str]:
    groups = group_questions(questions)
    if not any(question.rotation for question in questions):
        return ["The file has no rotations (no index of 10⁶ or more): no circular score."]
    notes = []
    incomplete = [group for group in groups if not is_complete(group)]
    if incomplete:
        shown = "; ".join(
            f"{group[0].group} has {len(group)} of {num_rotations(group)}" for group in incomplete[:_MAX_NOTED]
        )
        more = f"; and {len(incomplete) - _MAX_NOTED} more" if len(incomplete) > _MAX_NOTED else ""
        notes.append(
            f"{len(incomplete)} of {len(groups)} groups lack rotations and count as wrong in the circular score: "
            f"{shown}{more}. (By the rule vlmevalkit those that are there count, as in VLMEvalKit.)"
        )
    mixed = [group[0].group for group in groups if len({question.text for question in group}) > 1]
    if mixed:
        notes.append(
            f"{len(mixed)} groups hold different questions under one index modulo 10⁶ (first: {mixed[0]}): if these "
            "are no rotations, use the benchmark multiple_choice."
        )
    return notes
