"""Reading tab-separated tables, with errors that name file, row and column.

Fields may be quoted and then hold tabs and line breaks, as pandas and spreadsheets write them. Row numbers count data
rows from 1, as a spreadsheet without its header does; the line is given as well.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava_npu.errors import UserError, nearest

_MAX_FIELD = 2**31 - 1  # an embedded image is far longer than the csv module's 128 KiB default


@dataclass(frozen=True)
class Row:
    """One row: column → text, and where it stands."""

    cells: dict[str, str]
    file: Path
    number: int
    line: int

    def get(self, column: str) -> str:
        return self.cells.get(column, "")

    def text(self, column: str) -> str:
        """The cell to its last space; "" if it is blank or "nan", which pandas writes for an empty cell."""
        value = self.get(column)
        return "" if value.strip().lower() in ("", "nan") else value

    def label(self, column: str) -> str:
        """The cell without surrounding space; "" if it is blank or "nan"."""
        return self.text(column).strip()

    def error(self, column: str, problem: str) -> UserError:
        return UserError(f"{self.file}, row {self.number} (line {self.line}), column {column!r}: {problem}")


@dataclass(frozen=True)
class Table:
    path: Path
    sha256: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_tsv(path: Path, required: Sequence[str], *, separator: str = "\t") -> Table:
    """Reads a file with a header whose fields are separated by tabs, or by another character.

    Raises:
        UserError: no such file, empty, not UTF-8 (names row and column), a required column is missing or one is there
            twice, a row has too many or too few fields, a quoted field never ends.
    """
    data = _read(path)
    # Undecodable bytes survive as surrogates, so that the error can name the cell they are in.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    with raised_field_limit():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows: list[Row] = []
        try:
            header = _header(path, next(reader, []), required)
            for number, fields in enumerate((row for row in reader if row), start=1):
                rows.append(_row(path, header, fields, number, reader.line_num))
        except csv.Error as error:
            kind = "tab" if separator == "\t" else "comma"
            raise UserError(
                f"{path}, row {len(rows) + 1} (near line {reader.line_num}): not a valid {kind}-separated row: "
                f'{error}. A field with quotes, separators or line breaks must be in "…", its quotes doubled.'
            ) from error
    if not rows:
        raise UserError(f"{path} has a header but no rows.")
    return Table(path, hashlib.sha256(data).hexdigest(), tuple(header), tuple(rows))


def unique_indices(table: Table) -> list[str]:
    """The column `index`, checked: nothing empty, nothing twice."""
    seen: dict[str, Row] = {}
    for row in table.rows:
        index = row.label("index")
        if not index:
            raise row.error("index", "empty.")
        if index in seen:
            first = seen[index]
            raise row.error("index", f"{index} is there twice: first in row {first.number} (line {first.line}).")
        seen[index] = row
    return list(seen)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is not a file. Give the benchmark's .tsv file.")
    data = path.read_bytes()
    if not data.strip():
        raise UserError(f"{path} is empty.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is encoded in UTF-16. Save it as UTF-8.")
    if b"\0" in data:
        raise UserError(f"{path} is not a text file (it has zero bytes). Give the benchmark's .tsv file.")
    return data


def _header(path: Path, header: list[str], required: Sequence[str]) -> list[str]:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"{path}: column {twice[0]!r} is there twice.")
    for name in required:
        if name not in header:
            raise missing_column(path, header, name)
    return header


def missing_column(path: Path, found: Sequence[str], *names: str) -> UserError:
    """The error for a table that has none of the columns `names`."""
    wanted = " or ".join(repr(name) for name in names)
    shown = ", ".join(name[:40] for name in found[:20])
    separated = "commas" if path.suffix.lower() == ".csv" else "tabs"
    hint = nearest(names[0], found) or (f" Is it separated by {separated}?" if len(found) == 1 else "")
    return UserError(f"{path}: no column {wanted}. Columns found: {shown}.{hint}")


def _row(path: Path, header: list[str], fields: list[str], number: int, line: int) -> Row:
    if len(fields) != len(header):
        raise UserError(
            f"{path}, row {number} (line {line}): {len(fields)} fields, but the header has {len(header)} columns "
            f"(last field: {fields[-1][:60]!r})."
        )
    row = Row(dict(zip(header, fields, strict=True)), path, number, line)
    for column, value in row.cells.items():
        if any("\udc80" <= character <= "\udcff" for character in value):
            raise row.error(column, "not UTF-8. The file mixes encodings; save all of it as UTF-8.")
    return row


@contextmanager
def raised_field_limit() -> Iterator[None]:
    """The csv module's limit is global: raised for a while, and restored."""
    before = csv.field_size_limit(_MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
