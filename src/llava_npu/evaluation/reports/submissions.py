"""Files for a benchmark's server or official scoring tool, in exactly the form that it reads."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.evaluation.questions import Dataset
from llava_npu.files.atomic import write_bytes

FOLDER = "submission"
_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Submission:
    """What is written for a server or tool.

    Attributes:
        form: the files and their form, for people.
        build: dataset and answers by question id → name and content of each file.
    """

    form: str
    build: Callable[[Dataset, Mapping[str, str]], Mapping[str, bytes]]


def write_submission(
    submission: Submission, dataset: Dataset, answers: Mapping[str, str], folder: Path
) -> tuple[list[Path], list[str]]:
    """Writes a benchmark's submission files below `folder`, each atomically.

    Returns:
        the files, and notes for the reader.
    """
    try:
        contents = submission.build(dataset, answers)
    except MissingPackageError as error:
        return [], [f"No submission file: {error}"]
    paths = []
    for name, content in contents.items():
        path = folder / FOLDER / name
        write_bytes(path, content)
        paths.append(path)
    return paths, [f"For the server or tool: {FOLDER}/ ({', '.join(contents)})."] if contents else []


class MissingPackageError(UserError):
    """A package of an optional group is not installed."""


def as_json(value: Any) -> bytes:
    """As the official scripts write it: `json.dump` with its defaults."""
    return json.dumps(value).encode()


def as_json_lines(values: Sequence[Any]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def as_spreadsheet(columns: Sequence[str], rows: Sequence[Sequence[str | int | None]]) -> bytes:
    """An .xlsx file with one sheet, as pandas' `to_excel(index=False)` writes it.

    Texts are stored as texts, whatever they begin with: "=1+1" does not become a formula. Control characters, which
    the format cannot hold, are left out.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
    except ModuleNotFoundError as error:
        raise MissingPackageError("writing .xlsx needs openpyxl: pip install 'llava-npu[eval]'.") from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(columns))
    for row in rows:
        cells = []
        for value in row:
            cell = WriteOnlyCell(sheet, _NOT_IN_XML.sub("", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"
            cells.append(cell)
        sheet.append(cells)
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def number_or_text(identifier: str) -> int | str:
    """An id as the file had it: a number where it is one."""
    return int(identifier) if re.fullmatch(r"0|-?[1-9][0-9]*", identifier) else identifier
