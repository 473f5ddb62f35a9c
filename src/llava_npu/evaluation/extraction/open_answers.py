"""Open questions with short answers: reading them from VLMEvalKit's tables, and scoring answers against annotators'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llava_npu.evaluation.benchmarks import Benchmark, Parsed
from llava_npu.evaluation.extraction.vqa import NORMALISERS, soft_score
from llava_npu.evaluation.formats.llava_files import SHORT, bare, with_instruction
from llava_npu.evaluation.formats.table_images import TableImages, parse_list, table_question
from llava_npu.evaluation.formats.tables import Row, read_tsv, unique_indices
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import Score, score_credits

ABOUT = {
    "strict": "ours: the normal form of the VQA challenge with its faults fixed",
    "llava": "LLaVA's scripts: the same as they compute it",
}


def read_open_table(path: Path, column: str = "answer", instruction: str = SHORT, *, secret: bool = True) -> Dataset:
    """Reads a table of VLMEvalKit: index, question, image, and the answers as a list ['a', …] or one text.

    Args:
        path: the .tsv file.
        column: which one holds the answers; without it they are secret.
        secret: whether it may be missing or empty.
        instruction: the prompt's last lines, if the question does not end with them itself.

    Raises:
        UserError: anything wrong with the file, naming row and column.
    """
    table = read_tsv(path, required=("index", "question") if secret else ("index", "question", column))
    images = TableImages(table)
    unique_indices(table)
    empty = next((row for row in table.rows if not row.label(column)), None)
    if empty is not None and not secret:
        raise empty.error(column, "empty.")
    return Dataset(path, table.sha256, tuple(_question(row, images, column, instruction) for row in table.rows))


def _question(row: Row, images: TableImages, column: str, instruction: str) -> Question:
    text, answer = row.text("question"), row.label(column)
    references = parse_list(row, column, answer) if answer.startswith("[") else (answer,) if answer else ()
    return table_question(
        row,
        images,
        text=bare(text),
        prompt=with_instruction(text, instruction),
        answer=most_frequent(references),
        references=references,
    )


def most_frequent(references: Sequence[str]) -> str | None:
    """The answer that most annotators gave, the first of equals; None if there is none."""
    return max(references, key=references.count) if references else None


def normal_forms(question: Question, answer: str) -> Parsed:
    """The answer in both normal forms."""
    return {rule: normalise(answer) for rule, normalise in NORMALISERS.items()}


def _credit(
    question: Question, rule: str, reading: str | None, *, compare: Callable[[str, Sequence[str]], float]
) -> float | None:
    # In normal form, against the references in the same form. An answer of which nothing is left is right under the
    # original's rule if nothing is left of a reference either.
    if not question.references:
        return None
    if reading is None or (reading == "" and rule == "strict"):
        return 0.0
    return compare(reading, [NORMALISERS[rule](reference) for reference in question.references])


def _equals_any(answer: str, references: Sequence[str]) -> float:
    return float(answer in references)


# Agreement with annotators (see `vqa.soft_score`), as the VQA challenge, TextVQA and VizWiz count it.
soft_credit = partial(_credit, compare=soft_score)
score_soft = partial(score_credits, metric="VQA accuracy", credit=soft_credit)

# Whether an answer equals any reference.
exact_credit = partial(_credit, compare=_equals_any)
score_exact = partial(score_credits, metric="exact match", credit=exact_credit)


def review_secret(questions: Sequence[Question], parsed: Mapping[str, Parsed]) -> list[str]:
    """How many answers the benchmark keeps to itself."""
    secret = sum(not question.references and question.answer is None for question in questions)
    return [f"{secret} of {len(questions)} questions have no answer here: predicted, not scored."] if secret else []


@dataclass(frozen=True)
class OpenBenchmark(Benchmark):
    """A benchmark of questions with short answers: by default scored against ten annotators'."""

    parse: Callable[[Question, str], Parsed] = normal_forms
    score: Callable[[Sequence[Question], Mapping[str, Parsed]], list[Score]] = score_soft
    rules: Mapping[str, str] = field(default_factory=lambda: ABOUT)
    review: Callable[[Sequence[Question], Mapping[str, Parsed]], list[str]] = review_secret
    credit: Callable[[Question, str, str | None], float | None] = soft_credit
