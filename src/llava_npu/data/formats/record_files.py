"""JSON and JSONL files whose records are read one by one: what is kept is where each one stands.

Of a large file that index is a file in the user's cache, made once and shared by all processes: 24 bytes per record. It
is read like the data, a record at a time. Mapped, it would come to count as memory of every process (96 MB for four
million records); read, it stays in the system's cache, and no process grows with the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from llava_npu.data.formats.json_spans import Span, line_spans, list_spans
from llava_npu.data.tools.defects import RecordError
from llava_npu.errors import UserError
from llava_npu.files.cache import build_once, cache_root
from llava_npu.files.json_objects import unique_keys

LINE_SUFFIXES = (".jsonl", ".ndjson")
# Smaller files are indexed again in a fraction of a second, and leave nothing in the cache.
CACHED_FROM_BYTES = 64 << 20
INDEX_BLOCK = 1 << 14  # records that are indexed in memory before they are written
_INDEX = "spans.bin"
_INDEX_FORMAT = 2
_SPAN = struct.Struct("<3q")


class Entries(Protocol):
    """The raw entries of a file; each comes with its origin, the opening of messages about it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[str, Any]: ...


class JsonEntries:
    """The elements of a JSON list, or the lines of a .jsonl or .ndjson file.

    Raises:
        UserError: the file cannot be read, is not a JSON list, or is empty.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lines = path.suffix.lower() in LINE_SUFFIXES
        self._identity = _identity(path)
        self._index: Path | None = None  # where the spans are, or
        self._spans = array("q")  # the spans (see `json_spans`), one after the other
        if self._identity[0] < CACHED_FROM_BYTES:
            self._spans.extend(chain.from_iterable(_spans(path, lines=self._lines)))
        else:
            key = hashlib.sha256(json.dumps([_INDEX_FORMAT, str(path.resolve()), *self._identity]).encode())
            folder = cache_root() / "records" / key.hexdigest()[:32]
            self._index = build_once(folder, partial(_write_index, path=path, lines=self._lines)) / _INDEX
        self._length = self._index.stat().st_size // _SPAN.size if self._index else len(self._spans) // 3
        if not self._length:
            raise UserError(f"{path}: no records in this file; it needs at least one {{'id', 'conversations'}} object")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[str, Any]:
        if not 0 <= index < self._length:
            raise IndexError(index)
        start, length, line = self._span(index)
        origin = f"{self.path}:record {index}" + (f" (line {line})" if self._lines else "")
        raw = os.pread(_open(self.path, self._identity, os.getpid()).fileno(), length, start)
        try:
            return origin, json.loads(raw.decode(), object_pairs_hook=unique_keys)
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{origin}: {self.path} is not UTF-8 at byte {start + error.start} ({error.reason}); save the file as "
                "UTF-8",
                "unreadable record",
            ) from error
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{self.path}: not valid JSON at line {line}, column {error.colno}: {error.msg}; "
                "a .jsonl file holds one object per line",
                "unreadable record",
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deeply; thousands of digits; a key given twice
            raise RecordError(f"{origin} is not a JSON record: {error}", "unreadable record") from error

    def _span(self, index: int) -> Span:
        if self._index is None:
            start, length, line = self._spans[3 * index : 3 * index + 3]
            return start, length, line
        file = _open_index(self._index, os.getpid())
        return _SPAN.unpack(os.pread(file.fileno(), _SPAN.size, _SPAN.size * index))


def _spans(path: Path, *, lines: bool) -> Iterator[Span]:
    try:
        with path.open("rb") as file:
            yield from (line_spans if lines else list_spans)(file, path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror or error}") from error


def _write_index(folder: Path, *, path: Path, lines: bool) -> None:
    spans = _spans(path, lines=lines)
    with (folder / _INDEX).open("wb") as file:
        while block := list(islice(spans, INDEX_BLOCK)):
            file.write(b"".join(_SPAN.pack(*span) for span in block))


def _identity(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns): a file for which these are equal is taken to be unchanged."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror or error}") from error
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _open(path: Path, identity: tuple[int, int], process: int) -> BinaryIO:
    """The file, opened once per process, and still the one that was indexed."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror or error}") from error
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != identity:
        raise UserError(f"{path}: the data file has changed since this run opened it; start again")
    return file


@lru_cache(maxsize=64)
def _open_index(path: Path, process: int) -> BinaryIO:
    return path.open("rb", buffering=0)
