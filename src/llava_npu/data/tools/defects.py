"""What can be wrong with a training record, as one exception whose kind a report can count."""

from __future__ import annotations

from typing import Literal

from llava_npu.errors import UserError

Kind = Literal[
    "unreadable record",
    "malformed record",
    "empty or unanswerable",
    "image count",
    "image path refused",
    "image missing",
    "image unreadable",
    "not encodable",
    "answers cut off",
    "text cut off",
    "duplicate sample",
    "duplicate id",
]


class RecordError(UserError):
    """A record that cannot be trained on; the message names it and says how to fix it."""

    # The kind has a default because a data loader's worker rebuilds exceptions from their message alone.
    def __init__(self, message: str, kind: Kind = "malformed record") -> None:
        super().__init__(message)
        self.kind: Kind = kind


def shown(value: object) -> str:
    """A value short enough for a message, with its type where that is the fault."""
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}…"
    return text if isinstance(value, str) or value is None else f"{text} ({type(value).__name__})"


def require_encodable(text: str, where: str) -> None:
    """JSON may hold half of a surrogate pair ("\\ud83d"), which no tokenizer and no file system can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}: character {error.start} is a lone surrogate ({text[error.start]!r}), half of a broken emoji or "
            "rare character, or a byte of another encoding than UTF-8; repair or remove it"
        ) from error
