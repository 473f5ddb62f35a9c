"""Where each record of a JSON or JSONL file stands, in bytes: found in one pass that keeps none of them.

A span is (first byte, number of bytes, line; 0 in a list). A list's elements are found by parsing them one by one in a
window that moves over the file, so this pass also proves the JSON; lines are only found, and parsed when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava_npu.data.tools.defects import shown
from llava_npu.errors import UserError

Span = tuple[int, int, int]

MAX_RECORD_BYTES = 64 << 20
WINDOW_BYTES = 4 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = " \t\n\r"


def line_spans(file: BinaryIO, path: Path) -> Iterator[Span]:
    """The lines that are not blank. Only a newline ends a line: U+2028 may stand in a JSON string."""
    start, number = _skip_byte_order_mark(file), 0
    while line := file.readline(MAX_RECORD_BYTES):
        number += 1
        if len(line) == MAX_RECORD_BYTES:
            raise UserError(
                f"{path}: line {number} is longer than {MAX_RECORD_BYTES >> 20} MiB; a .jsonl file holds one object "
                "per line: if this is a list, name it .json"
            )
        if not line.isspace():
            yield start, len(line), number
        start += len(line)


def list_spans(file: BinaryIO, path: Path) -> Iterator[Span]:
    """The elements of a JSON list.

    Raises:
        UserError: it is not valid JSON, or no list; with the line and the column (in bytes).
    """
    window = _Window(file, path)
    if window.next_sign() != "[":
        raise _not_a_list(window)
    window.position += 1
    sign = window.next_sign()
    while sign != "]":
        yield window.parse()[1]
        sign = window.next_sign()
        if sign not in (",", "]"):
            raise window.error("Expecting ',' delimiter")
        if sign == ",":
            window.position += 1
            window.next_sign()
    window.position += 1
    if window.next_sign():
        raise window.error("Extra data")


def _not_a_list(window: _Window) -> UserError:
    value, _ = window.parse()
    if window.next_sign():
        return window.error("Extra data; if the file holds one object per line, name it .jsonl")
    return UserError(f"{window.path}: the file holds {shown(value)}, not a list of records; wrap the record in [ ]")


class _Window:
    """A stretch of the file as text of one character per byte (Latin-1): JSON's own signs are ASCII."""

    def __init__(self, file: BinaryIO, path: Path):
        self.path = path
        self.position = 0
        self._file = file
        self._base = _skip_byte_order_mark(file)  # where the window begins in the file
        self._line = 1  # in which it begins
        self._line_start = self._base  # where that line begins in the file
        self._text = ""
        self._decoder = json.JSONDecoder()

    def next_sign(self) -> str:
        """Moves to the next character that is not white space and returns it; '' at the end of the file."""
        while True:
            text, position = self._text, self.position
            while position < len(text) and text[position] in _SPACE:
                position += 1
            self.position = position
            if position < len(text):
                return text[position]
            if not self._read_on():
                return ""

    def parse(self) -> tuple[Any, Span]:
        """The value that starts here, and its span; moves behind it."""
        while True:
            start = self.position
            try:
                value, end = self._decoder.raw_decode(self._text, start)
            except json.JSONDecodeError as error:
                # Cut off by the window, or wrong? What is wrong stays wrong when there is more of it.
                if len(self._text) - start < MAX_RECORD_BYTES and self._read_on():
                    continue
                self.position = error.pos
                raise self.error(error.msg) from error
            except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
                raise UserError(f"{self.path}: not a JSON list of records: {error}") from error
            if len(self._text) - end <= 2 and self._read_on():  # a number may go on: 1, "1.", "1e+"
                continue
            self.position = end
            span = (self._base + start, end - start, 0)
            if end > WINDOW_BYTES:
                self._drop()
            return value, span

    def error(self, message: str) -> UserError:
        line = self._line + self._text.count("\n", 0, self.position)
        newline = self._text.rfind("\n", 0, self.position)
        line_start = self._line_start if newline < 0 else self._base + newline + 1
        column = self._base + self.position - line_start + 1
        return UserError(f"{self.path}: not valid JSON at line {line}, column {column}: {message}")

    def _drop(self) -> None:
        """Forgets what lies behind the position."""
        newline = self._text.rfind("\n", 0, self.position)
        if newline >= 0:
            self._line_start = self._base + newline + 1
            self._line += self._text.count("\n", 0, self.position)
        self._base += self.position
        self._text = self._text[self.position :]
        self.position = 0

    def _read_on(self) -> bool:
        """Adds more of the file; False at its end."""
        # As much as there is: so the repeated parsing of a long record stays linear in its length.
        more = self._file.read(max(WINDOW_BYTES, len(self._text) - self.position))
        if more:
            self._drop()
            self._text += more.decode("latin-1")
        return bool(more)


def _skip_byte_order_mark(file: BinaryIO) -> int:
    if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
        return len(_BYTE_ORDER_MARK)
    file.seek(0)
    return 0
