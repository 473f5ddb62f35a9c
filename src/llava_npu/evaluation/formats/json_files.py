"""Reading JSON and JSON-lines files, with errors that name file, record and field."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError, nearest
from llava_npu.files.json_objects import unique_keys


@dataclass(frozen=True)
class JsonRecord:
    """One JSON object, and where it stands ("line 3", "record 'v1_0'")."""

    values: dict[str, Any]
    file: Path
    place: str

    def error(self, field: str, problem: str) -> UserError:
        return UserError(f"{self.file}, {self.place}, field {field!r}: {problem}")

    def get(self, field: str) -> str:
        """A text, or a number as text; "" if it is absent, null or NaN."""
        value = self.values.get(field)
        if value is None or _is_nan(value):
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(field, f"{str(value)[:60]!r} is not a string.")
        return str(value)

    def need(self, field: str) -> str:
        """As `get`, but it must be there and not blank."""
        if field not in self.values:
            hint = nearest(field, self.values)
            raise self.error(field, f"missing. Found: {', '.join(list(self.values)[:20]) or 'nothing'}.{hint}")
        value = self.get(field)
        if not value.strip():
            raise self.error(field, "empty.")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts; () if it is absent or null. NaN, which pandas writes for nothing, is none."""
        value = self.values.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
            raise self.error(field, f"{str(value)[:60]!r} is not a list of strings.")
        return tuple(str(item) for item in value if not _is_nan(item))

    def options(self, field: str) -> dict[str, str]:
        """A list of texts as the options A, B, …; NaN may fill its end."""
        values = self.values.get(field)
        if isinstance(values, list) and any(map(_is_nan, values[: len(self.texts(field))])):
            raise self.error(field, "an option before others is NaN (nothing): its letter would be another's.")
        return dict(zip(string.ascii_uppercase, self.texts(field), strict=False))

    def letter(self, field: str, options: Mapping[str, str]) -> str:
        """The letter of one of the options, in brackets or not."""
        letter = self.need(field).strip("()")
        if letter not in options:
            raise self.error(field, f"{letter[:60]!r} is none of the choices ({', '.join(options)}).")
        return letter


def read_jsonl(path: Path) -> tuple[list[JsonRecord], str]:
    """The objects of a file with one on each line, and the file's SHA-256.

    Raises:
        UserError: no such file, empty, not UTF-8, or a line that is not a JSON object.
    """
    data, text = read_text(path)
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(_record(_parse(line, f"{path}, line {number}"), path, f"line {number}"))
    return records, hashlib.sha256(data).hexdigest()


def read_json_list(path: Path) -> tuple[list[JsonRecord], str]:
    """The objects of a file that is one JSON list, and the file's SHA-256."""
    value, digest = _read_whole(path)
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: a list of objects is expected, not {_kind(value)}.")
    return [_record(item, path, f"record {number}") for number, item in enumerate(value, start=1)], digest


def read_json_table(path: Path) -> tuple[dict[str, JsonRecord], str]:
    """The objects of a file that is one JSON object of objects, by key, and the file's SHA-256."""
    value, digest = _read_whole(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: an object of objects is expected, not {_kind(value)}.")
    return {key: _record(item, path, f"record {key!r}") for key, item in value.items()}, digest


def read_json_object(path: Path) -> tuple[JsonRecord, str]:
    """A file that is one JSON object, and the file's SHA-256."""
    value, digest = _read_whole(path)
    return _record(value, path, "top level"), digest


def members(record: JsonRecord, field: str) -> list[JsonRecord]:
    """The objects in a list field of an object."""
    value = record.values.get(field)
    if not isinstance(value, list) or not value:
        raise record.error(field, f"a list of objects is expected, not {_kind(value)}.")
    return [_record(item, record.file, f"{field} {number}") for number, item in enumerate(value, start=1)]


def combined_digest(digests: Sequence[str]) -> str:
    """One checksum for several files: of a single one its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _read_whole(path: Path) -> tuple[Any, str]:
    data, text = read_text(path)
    return _parse(text, str(path)), hashlib.sha256(data).hexdigest()


def read_text(path: Path) -> tuple[bytes, str]:
    """A file's bytes, and their text.

    Raises:
        UserError: no such file, empty, or not UTF-8 (names the line).
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    data = path.read_bytes()
    if not data.strip():
        raise UserError(f"{path} is empty.")
    try:
        return data, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits, a key given twice
        raise UserError(f"{where}: not valid JSON: {error}.") from error


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _record(value: Any, path: Path, place: str) -> JsonRecord:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {place}: an object is expected, not {_kind(value)}.")
    return JsonRecord(value, path, place)


def _kind(value: Any) -> str:
    if value in ({}, []):
        return f"an empty {'object' if isinstance(value, dict) else 'list'}"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), "a number")
