"""Text from models and data on its way to terminals, spreadsheets and Markdown viewers, where it must not act.

What a model answers and what a data file calls its categories comes from outside. A terminal obeys escape sequences, a
spreadsheet computes cells that begin like a formula, and a Markdown viewer renders HTML and loads remote images. Text
that passes through here stays text.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# "Cc" are control characters; of the format characters those that reorder what follows, and the line separators.
_STEERING = frozenset("\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# With the full-width forms, as in https://owasp.org/www-community/attacks/CSV_Injection
_BEGINS_FORMULA = tuple("=+-@\t\n＝＋－＠")
_MARKUP = re.compile(r"[\\`*\[\]|~]|<(?=[A-Za-z/!?])|&(?=#?\w+;)")


def printable(text: str) -> str:
    """The text with what steers a terminal spelled out: control characters, and those that change the direction."""
    return "".join(ascii(each)[1:-1] if _steers(each) else each for each in text)


def _steers(character: str) -> bool:
    if character in "\n\t":
        return False
    return character in _STEERING or unicodedata.category(character) in ("Cc", "Cs")


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A CSV file's text. Cells that a spreadsheet would take for a formula begin with an apostrophe, as its text does;
    what steers a terminal is spelled out.

    Numbers stay numbers, and so does text that is one.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(_csv_cell, header))
    writer.writerows(map(_csv_cell, row) for row in rows)
    return stream.getvalue()


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # Python before 3.13 writes "\r" unquoted: a new row
    text = printable(text)
    begins = text.startswith(_BEGINS_FORMULA) or text.lstrip().startswith(_BEGINS_FORMULA)  # some skip the spaces
    return f"'{text}" if begins and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()


def markdown_text(text: str) -> str:
    """Text within a line of Markdown: no HTML, no images, no links, no emphasis."""
    return _MARKUP.sub(_escaped, printable(" ".join(text.split())))


def _escaped(found: re.Match[str]) -> str:
    return {"<": "&lt;", "&": "&amp;"}.get(found[0], f"\\{found[0]}")


def markdown_code(text: str) -> str:
    """Text as code within a line of Markdown, whatever backticks it has."""
    line = printable(" ".join(text.split()))
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
