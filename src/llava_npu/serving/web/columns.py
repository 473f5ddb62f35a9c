"""What happens behind the page: one column of conversation for each model, all about the same picture."""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from PIL import Image

from llava_npu.data.images import load_image
from llava_npu.errors import UserError
from llava_npu.serving.background import BackgroundEngine
from llava_npu.serving.engine import Engine
from llava_npu.serving.generation import Piece, Sampling, Ticket
from llava_npu.serving.prompts import Turns, prepare_prompt


@dataclass(frozen=True)
class Column:
    """A model that answers, with the name that is shown for it."""

    name: str
    engine: Engine
    background: BackgroundEngine


@dataclass(frozen=True)
class Exchange:
    """A question and each column's answer to it, as far as it has come; None from a column that failed."""

    question: str
    answers: tuple[str | None, ...]


@dataclass(frozen=True)
class Talk:
    """A visitor's conversation.

    Attributes:
        picture: what it is about, if anything.
        source: the file that the picture came from.
        exchanges: questions and answers, oldest first.
    """

    picture: Image.Image | None = None
    exchanges: tuple[Exchange, ...] = ()
    source: str | None = None

    def turns(self, column: int, question: str) -> Turns:
        """The prompt of a column: its own answers, and the question that follows."""
        turns = []
        for exchange in self.exchanges:
            answer = exchange.answers[column]
            if answer:  # a template has no place for an answer without words
                turns.append({"from": "human", "value": exchange.question})
                turns.append({"from": "gpt", "value": answer})
        turns.append({"from": "human", "value": question})
        if self.picture is not None:
            turns[0] = {**turns[0], "value": f"<image>\n{turns[0]['value']}"}
        return turns


def ask(columns: Sequence[Column], talk: Talk, question: str, sampling: Sampling) -> Iterator[Talk]:
    """All columns answer at the same time; yields the conversation as it grows. Closing the iterator stops them.

    Raises:
        UserError: the question has no words, `<image>` is written in it, or a prompt has become too long.
    """
    if not question.strip():
        raise UserError("Write a question first.")
    if "<image>" in question:
        raise UserError("'<image>' cannot be written in a question here: the picture comes first by itself.")
    pictures = [] if talk.picture is None else [talk.picture]
    tickets = []
    for place, column in enumerate(columns):
        prompt = prepare_prompt(column.engine.processor, talk.turns(place, question), pictures)
        room = column.engine.max_length - len(prompt.input_ids)
        limited = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, room)))
        column.engine.check(prompt, limited)
        tickets.append(Ticket(prompt, limited))
    news: _News = queue.SimpleQueue()
    answers: list[str | None] = [""] * len(columns)
    try:
        for place, (column, ticket) in enumerate(zip(columns, tickets, strict=True)):
            column.background.submit(ticket, partial(_tell, news, place))
        running = len(columns)
        while running:
            place, piece = news.get()
            running -= piece.finish_reason is not None
            if piece.error is not None:
                answers[place] = None
                raise UserError(f"{columns[place].name} failed: {piece.error}")
            if piece.text or piece.finish_reason:
                answers[place] = (answers[place] or "") + piece.text
                exchange = Exchange(question, tuple(answers))
                yield replace(talk, exchanges=(*talk.exchanges, exchange))
    finally:
        for ticket in tickets:
            ticket.cancel()


_MAX_PIXELS = 25_000_000
_News = queue.SimpleQueue[tuple[int, Piece]]


def _tell(news: _News, place: int, piece: Piece) -> None:
    news.put((place, piece))


def about(path: str | None, talk: Talk) -> Talk:
    """The conversation, if it is about this picture's file; else a new one about it.

    Raises:
        UserError: the file is no picture, or too large a one.
    """
    if path == talk.source:
        return talk
    picture = None if path is None else load_image(Path(path), "picture", max_pixels=_MAX_PIXELS)
    return Talk(picture, source=path)


def without_last(talk: Talk) -> tuple[Talk, str]:
    """The conversation before its last question, and that question.

    Raises:
        UserError: nothing has been asked.
    """
    if not talk.exchanges:
        raise UserError("Nothing has been asked yet.")
    return replace(talk, exchanges=talk.exchanges[:-1]), talk.exchanges[-1].question


def flag(columns: Sequence[Column], talk: Talk, sampling: Sampling, folder: Path) -> Path:
    """Keeps a conversation in a local file, one JSON value a line, its picture beside it. Nothing of the visitor.

    Returns:
        The file.

    Raises:
        UserError: there is no conversation, or the file cannot be written.
    """
    if not talk.exchanges:
        raise UserError("There is nothing to flag yet.")
    path = folder / "flagged.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "models": [column.name for column in columns],
            "image": None if talk.picture is None else _keep_picture(talk.picture, folder),
            "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p},
            "exchanges": [{"question": each.question, "answers": list(each.answers)} for each in talk.exchanges],
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _keep_picture(picture: Image.Image, folder: Path) -> str:
    name = f"{hashlib.sha256(picture.tobytes()).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        picture.save(folder / name)
    return name
