"""Answers that were given elsewhere, scored here: no model is needed.

    LLaVA's answer files     .jsonl: question_id, text (and prompt)
    VLMEvalKit's             .xlsx, .tsv, .csv or .json: index, prediction (and question)
    lmms-eval's sample logs  .jsonl: doc (with the question's id) or doc_id, resps
    predictions.jsonl        as `llava-npu eval` writes it: id, answer

Every answer is matched to its question by id. Where a question file has an id several times (TextVQA's image ids, MME's
images), by id and prompt, else by id and order. Where a file has prompts or questions, most must be those that are
asked: many benchmarks count their questions from 0.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.evaluation.formats.json_files import read_json_list, read_jsonl
from llava_npu.evaluation.formats.tables import read_tsv
from llava_npu.evaluation.questions import Answer, Question
from llava_npu.evaluation.reports.submissions import MissingPackageError
from llava_npu.files.untrusted import printable

_IDS_OF_A_DOC = ("question_id", "index", "questionId", "id", "pid", "qid", "data_id", "idx")  # lmms-eval's tasks
_OCCURRENCE = re.compile(r"[#/]\d+$")  # how benchmarks tell questions with one id apart
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # an answer that was cut within an emoji; no file can hold it
_ANSWERS_OF_MODELS = ("prediction", "pred", "predicted", "response", "output", "model_answer", "model_output", "text")
_COLUMNS = ("index", "prediction")
_MAX_NAMED = 3


@dataclass(frozen=True)
class StoredAnswer:
    """One line of a file of answers.

    Attributes:
        id: of its question.
        text: None where the file has no answer.
        prompt: what was answered.
        asked: the question, where the file has that instead.
    """

    id: str
    text: str | None
    prompt: str | None = None
    asked: str | None = None


class StoredAnswers:
    """An `Answerer` that has all its answers already."""

    device = "none: stored answers"

    def __init__(self, path: Path, questions: Sequence[Question]):
        """
        Args:
            path: the file of answers.
            questions: what it is to answer.

        Raises:
            UserError: the file cannot be read, or holds answers to other questions.
        """
        self.path = path
        stored, data = read_answers(path)
        self.fingerprint = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.settings: Mapping[str, str | int | float | bool | None] = {"answer": "stored"}
        if not stored:
            raise UserError(f"{path} holds no answers.")
        self._answers, unmatched, again = _match(stored, questions)
        self.notes = [f"Stored answers of {path} were scored; no model was run."]
        self._note_repeated(again)
        missing = [question.id for question in questions if question.id not in self._answers]
        if (missing and unmatched) or not self._answers:
            others = f"{len(unmatched)} of its {len(stored)} answers are to other questions"
            raise UserError(
                f"{path} does not answer these questions: {others} ({_named(each.id for each in unmatched)}), and "
                f"{len(missing)} of {len(questions)} questions have no answer ({_named(missing)}). Give the data that "
                "the answers were generated from."
            )
        self._check_prompts(questions)
        if all(
            _repeats(self._answers[question.id], question) for question in questions if question.id in self._answers
        ):
            raise UserError(f"{path} holds the questions, not answers to them. Give the file that a model wrote.")
        if unmatched:
            names = _named(each.id for each in unmatched)
            self.notes.append(f"{len(unmatched)} answers are to questions that are not asked here ({names}): ignored.")

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """What the file says; an error where it says nothing."""
        return [self._answer(question) for question in questions]

    def _note_repeated(self, again: Sequence[tuple[StoredAnswer, set[str | None]]]) -> None:
        """Raises `UserError` for a second answer that differs: which one counts is unclear."""
        for each, texts in again:
            if each.text not in texts:
                raise UserError(
                    f"{self.path} answers question {printable(each.id)} twice, and differently: "
                    f"{printable(str(next(iter(texts))))[:60]!r} and {printable(str(each.text))[:60]!r}. Remove one of "
                    "the two."
                )
        if again:
            named = _named(each.id for each, _ in again)
            self.notes.append(f"{len(again)} answers stand there twice, equal ({named}): counted once.")

    def _check_prompts(self, questions: Sequence[Question]) -> None:
        """Raises `UserError` if most of the prompts, where the file has them, ask something else."""
        told = [(question, stored) for question in questions if (stored := self._answers.get(question.id))]
        told = [(question, stored) for question, stored in told if stored.prompt or stored.asked]
        others = [(question, stored) for question, stored in told if not _asks(stored, question)]
        if not others:
            return
        question, stored = others[0]
        what = (
            f"{len(others)} of its {len(told)} prompts ask something else than the question of their id (first: "
            f"{printable(question.id)} is {printable(question.text)[:80]!r}, and there "
            f"{printable(stored.prompt or stored.asked or '')[:80]!r})"
        )
        if 2 * len(others) > len(told):
            raise UserError(
                f"{self.path} does not answer these questions: {what}. Give the data that the answers were generated "
                "from."
            )
        self.notes.append(f"Of {self.path.name}, {what}.")

    def _answer(self, question: Question) -> Answer:
        stored = self._answers.get(question.id)
        if stored is None or stored.text is None:
            return Answer(question.prompt, "", error=f"{self.path.name} has no answer to it")
        return Answer(stored.prompt or question.prompt, stored.text)


def read_answers(path: Path) -> tuple[list[StoredAnswer], bytes]:
    """The answers of a file in one of the formats above, and its bytes.

    Raises:
        UserError: the file is missing, or it is in none of these formats.
    """
    if not path.is_file():
        raise UserError(f"--predictions {path} is not a file.")
    data, suffix = path.read_bytes(), path.suffix.lower()
    if suffix == ".xlsx":
        return list(_from_table(path, _spreadsheet_rows(path, data))), data
    if suffix in (".tsv", ".csv"):
        table = read_tsv(path, _COLUMNS, separator="\t" if suffix == ".tsv" else ",")
        return list(_from_table(path, [table.columns, *(list(row.cells.values()) for row in table.rows)])), data
    if suffix in (".jsonl", ".json"):
        is_list = suffix == ".json" and data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        records, _ = read_json_list(path) if is_list else read_jsonl(path)
        return [_from_record(record.values, path, record.place) for record in records], data
    raise UserError(f"--predictions {path}: .jsonl, .xlsx, .tsv or .csv is expected.")


def _from_record(values: Mapping[str, Any], path: Path, place: str) -> StoredAnswer:
    prompt = values.get("prompt")
    prompt = _HALF_A_PAIR.sub("\ufffd", prompt) if isinstance(prompt, str) else None
    asked = None
    if "resps" in values:  # lmms-eval
        doc = values.get("doc")
        doc = doc if isinstance(doc, dict) else {}
        field = next((field for field in _IDS_OF_A_DOC if field in doc), None)
        name = values.get("doc_id") if field is None else doc[field]
        asked = doc.get("question") if field is None else None  # its place from 0 need not be the question's id
        answer = values["resps"]
        while isinstance(answer, list):
            answer = answer[0] if answer else None
        if not isinstance(answer, str | None):
            raise UserError(f"{path}, {place}: 'resps' holds a likelihood ({answer}), not an answer's text.")
    elif "index" in values and "prediction" in values:
        name, answer = values["index"], values["prediction"]
    elif "question_id" in values and "text" in values:
        name, answer = values["question_id"], values["text"]
    elif "id" in values and "answer" in values:
        if other := next((key for key in _ANSWERS_OF_MODELS if key in values), None):
            raise UserError(
                f"{path}, {place}: has both 'answer' and {other!r}, and it is unclear which one the model gave. Name "
                "that one 'prediction' and the id 'index', and leave the other one out."
            )
        name, answer = values["id"], values["answer"]
        if values.get("error") is not None:
            answer = None
    else:
        raise UserError(
            f"{path}, {place}: not an answer. Expected are question_id and text (LLaVA), doc and resps (lmms-eval), "
            f"index and prediction (VLMEvalKit), or id and answer; found: {', '.join(list(values)[:10]) or 'nothing'}."
        )
    if name is None or isinstance(name, list | dict):
        raise UserError(f"{path}, {place}: the answer names no question.")
    return StoredAnswer(_id(name), _text(answer, f"{path}, {place}"), prompt, _asked(values.get("question") or asked))


def _from_table(path: Path, rows: Iterable[Sequence[Any]]) -> Iterator[StoredAnswer]:
    lines = iter(rows)
    header = [str(cell) for cell in next(lines, [])]
    for column in _COLUMNS:
        if header.count(column) != 1:
            found = "twice a" if column in header else "no"
            raise UserError(f"{path}: {found} column {column!r}. Columns found: {', '.join(header[:20])}.")
    index, prediction = map(header.index, _COLUMNS)
    question = header.index("question") if "question" in header else len(header)
    for number, cells in enumerate(lines, start=1):
        if not any(cell not in (None, "") for cell in cells):
            continue
        if len(cells) <= index or cells[index] in (None, ""):
            raise UserError(f"{path}, row {number}, column 'index': empty.")
        # A spreadsheet's rows end with their last filled cell.
        given = cells[prediction] if len(cells) > prediction else None
        text = _text(given, f"{path}, row {number}, column 'prediction'")
        asked = _asked(cells[question]) if len(cells) > question else None
        yield StoredAnswer(_id(cells[index]), text, asked=asked)


def _spreadsheet_rows(path: Path, data: bytes) -> list[Sequence[Any]]:
    try:
        from openpyxl import load_workbook
    except ModuleNotFoundError as error:
        raise MissingPackageError("reading .xlsx needs openpyxl: pip install 'llava-npu[eval]'.") from error
    try:
        return list(load_workbook(io.BytesIO(data), read_only=True).active.iter_rows(values_only=True))
    except Exception as error:  # openpyxl lets whatever its parsers meet escape
        raise UserError(f"{path} is not a readable .xlsx file: {error}") from error


def _id(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _text(value: Any, place: str) -> str | None:
    """An answer's text; None for what pandas and JSON write where there is none.

    Raises:
        UserError: it is a date, of which the text that a spreadsheet took for one cannot be told.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, date | time | timedelta):
        raise UserError(f"{place}: a date or time ({value}); a spreadsheet made it of the answer. Write it as text.")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _HALF_A_PAIR.sub("\ufffd", text)


def _asked(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _asks(stored: StoredAnswer, question: Question) -> bool:
    """Whether a prompt contains the question, or the other way round (VLMEvalKit keeps a hint apart)."""
    said = _squeezed(stored.prompt or stored.asked or "")
    return any(
        text in said or (not stored.prompt and said in text)
        for text in map(_squeezed, (question.text, question.prompt))
    )


def _repeats(stored: StoredAnswer, question: Question) -> bool:
    return _squeezed(stored.text or "") in (_squeezed(question.prompt), _squeezed(question.text))


def _squeezed(text: str) -> str:
    return "".join(text.casefold().split())


def _match(
    stored: Sequence[StoredAnswer], questions: Sequence[Question]
) -> tuple[dict[str, StoredAnswer], list[StoredAnswer], list[tuple[StoredAnswer, set[str | None]]]]:
    """Answers by question id; those to no question; and those to one that is answered, with what was answered."""
    by_id = {question.id: question for question in questions}
    alike: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        alike[_OCCURRENCE.sub("", question.id)].append(question)
    found: dict[str, StoredAnswer] = {}
    unmatched, again = [], []
    for each in stored:
        names = (each.id, f"v1_{each.id}")  # MM-Vet's
        named = {name: by_id[name] for name in names if name in by_id}
        candidates = list((named | {question.id: question for question in alike.get(each.id, [])}).values())
        left = [question for question in candidates if question.id not in found]
        same = [question for question in left if each.prompt and question.prompt in each.prompt]
        if not candidates:
            unmatched.append(each)
        elif not left:
            again.append((each, {found[question.id].text for question in candidates}))
        else:
            found[(same or left)[0].id] = each
    return found, unmatched, again


def _named(names: Iterable[str]) -> str:
    listed = list(map(printable, names))
    return f"first: {', '.join(listed[:_MAX_NAMED])}" if listed else "none"
