"""Training records in LLaVA's JSON (or JSONL) form, checked before anything is computed from them.

A file is a list of records, one per line in JSONL::

    {"id": "0017", "image": "coco/0017.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                               {"from": "gpt", "value": "A cat."}]}

`image` is absent for text, one path, or a list of paths, each with its own `<image>` in the human turns. Every defect
is a `UserError` that names the file, the record's position and id, the field, the value and the fix: a fault in record
400,000 is found when the file is opened, not after a day of training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError, nearest

IMAGE_MARK = "<image>"
ROLES = ("human", "gpt")
LINE_SUFFIXES = (".jsonl", ".ndjson")
# Of any system, whichever runs: a data file is written on one machine and read on another.
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")
_SEPARATORS = re.compile(r"[/\\]")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: `role` is 'human' or 'gpt', `text` its words with an `<image>` where each picture stands."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about zero or more images.

    Args:
        id: the record's own name, for reports.
        conversations: alternating turns.
        images: paths as written in the file, relative to `image_root`, in the order of their `<image>`s.
        origin: where the record stands, e.g. "train.json:record 17" (counted from 0), the opening of every message.
        image_root: the folder that `images` are relative to.
    """

    id: str
    conversations: tuple[Turn, ...]
    images: tuple[str, ...]
    origin: str
    image_root: Path = Path()

    @property
    def name(self) -> str:
        """The record in an error message: "train.json:record 17 (id '0017')"."""
        return f"{self.origin} (id {self.id!r})"

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """The images' full paths. They never leave `image_root`: `load_records` refuses such names."""
        return tuple(self.image_root / image for image in self.images)


def load_records(path: str | Path, image_root: str | Path | None = None) -> list[Record]:
    """Reads and checks a whole data file.

    Args:
        path: a JSON list, or one JSON object per line where the name ends in .jsonl or .ndjson.
        image_root: the folder of the images; by default the data file's own.

    Raises:
        UserError: the file cannot be read, or a record is wrong; images themselves are opened later.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    entries = _read_lines(path) if path.suffix.lower() in LINE_SUFFIXES else _read_list(path)
    if not entries:
        raise UserError(f"{path}: no records in this file; it needs at least one {{'id', 'conversations'}} object")
    return [_parse_record(entry, index, origin, root) for index, (origin, entry) in enumerate(entries)]


def fingerprint(path: str | Path) -> str:
    """The file's content as 'sha256:…': equal when, and only when, the data is the same, wherever the file lies."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror or error}") from error
    return f"sha256:{digest.hexdigest()}"


def parse_turns(conversations: Sequence[Turn | Mapping[str, Any]], name: str) -> tuple[Turn, ...]:
    """Turns LLaVA's list of {"from", "value"} into checked `Turn`s; `name` opens each error message.

    Checked: known roles, text values, strict alternation, no `<image>` in an answer, no empty question.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str | bytes):
        raise UserError(
            f"{name}: 'conversations' is {_shown(conversations)}, not a list; "
            'write a list of {"from": "human" | "gpt", "value": "…"}'
        )
    if not conversations:
        raise UserError(f"{name}: 'conversations' is empty; it needs a human turn and a gpt turn")
    turns = tuple(_parse_turn(turn, f"{name}: conversations[{i}]") for i, turn in enumerate(conversations))
    for i in range(1, len(turns)):
        if turns[i].role == turns[i - 1].role:
            raise UserError(
                f"{name}: conversations[{i}].from is {turns[i].role!r}, as in the turn before it; human and gpt take "
                "turns: join the two texts or add the missing turn between them"
            )
    return turns


def _parse_turn(turn: Turn | Mapping[str, Any], where: str) -> Turn:
    if isinstance(turn, Turn):
        role: Any = turn.role
        text: Any = turn.text
    elif isinstance(turn, dict | Mapping):  # dict first: asking an abstract class is ten times slower
        for key in ("from", "value"):
            if key not in turn:
                raise UserError(f"{where} has no {key!r}; a turn is {{'from': 'human' | 'gpt', 'value': '…'}}")
        role, text = turn["from"], turn["value"]
    else:
        raise UserError(f"{where} is {_shown(turn)}; a turn is {{'from': 'human' | 'gpt', 'value': '…'}}")

    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise UserError(f"{where}.from is {_shown(role)}; allowed are 'human' and 'gpt'.{hint}")
    if not isinstance(text, str):
        raise UserError(f"{where}.value is {_shown(text)}; it must be text")
    _require_encodable(text, f"{where}.value")
    if role == "gpt" and IMAGE_MARK in text:
        raise UserError(
            f"{where}.value: an answer contains '{IMAGE_MARK}' ({_shown(text)}); images belong to human turns: "
            "move it there, or reword the answer"
        )
    if role == "human" and not text.strip():
        raise UserError(f"{where}.value: a human turn is empty; give it a question or an '{IMAGE_MARK}'")
    return Turn(role, text)


def _parse_record(entry: Any, index: int, origin: str, root: Path) -> Record:
    if not isinstance(entry, dict):
        raise UserError(f"{origin} is {_shown(entry)}; a record is an object with 'id', 'conversations' and 'image'")
    identity = entry.get("id", index)
    if not isinstance(identity, str | int):
        raise UserError(f"{origin}: 'id' is {_shown(identity)}; it must be text or a whole number")
    name = f"{origin} (id {str(identity)!r})"
    if "conversations" not in entry:
        hint = nearest("conversations", entry)
        raise UserError(f"{name} has no 'conversations'; its keys are {sorted(entry)}.{hint}")
    turns = parse_turns(entry["conversations"], name)
    if not any(turn.role == "gpt" for turn in turns):
        raise UserError(f"{name}: no gpt turn, so there is nothing to learn; add the answer or remove the record")
    images = _parse_images(entry, name)
    _require_matching_marks(turns, images, name)
    return Record(str(identity), turns, images, origin, root)


def _parse_images(entry: dict[str, Any], name: str) -> tuple[str, ...]:
    """The names in 'image' (one or a list), refused where they could lead out of the image folder."""
    value = entry.get("image")
    if value is None:
        if "images" in entry:
            raise UserError(f"{name}: 'images' is not a field of this format; write 'image': one path or a list")
        return ()
    names = value if isinstance(value, list) else [value]
    for image in names:
        if not isinstance(image, str) or not image:
            raise UserError(f"{name}: 'image' is {_shown(value)}; write one path, a list of paths, or leave it out")
        _require_encodable(image, f"{name}: 'image'")
        if _ABSOLUTE.match(image):
            raise UserError(
                f"{name}: 'image' is the absolute path {image!r}; write it relative to the image folder (image_root)"
            )
        if "\0" in image or ".." in _SEPARATORS.split(image):
            raise UserError(f"{name}: 'image' is {image!r}, which leaves the image folder; keep images inside it")
    return tuple(names)


def _require_matching_marks(turns: Sequence[Turn], images: Sequence[str], name: str) -> None:
    """Each image has one `<image>`. LLaVA itself trains on a mismatch by moving images between samples."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks == len(images):
        return
    if not marks:
        fix = f"start the first human turn with '{IMAGE_MARK}\\n'" + (" once per image" if len(images) > 1 else "")
    elif not images:
        fix = "add the 'image' field, or remove the mark from the text"
    else:
        fix = f"write one '{IMAGE_MARK}' per image, in the order of the 'image' list"
    raise UserError(f"{name}: {len(images)} image(s) but {marks} '{IMAGE_MARK}' in the human turns; {fix}")


def _read_list(path: Path) -> list[tuple[str, Any]]:
    text = _read_text(path)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; if the file holds one object per line, name it .jsonl" if error.msg == "Extra data" else ""
        raise UserError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}{hint}"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise UserError(f"{path}: not a JSON list of records: {error}") from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: the file holds {_shown(entries)}, not a list of records; wrap the record in [ ]")
    return [(f"{path}:record {index}", entry) for index, entry in enumerate(entries)]


def _read_lines(path: Path) -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: not valid JSON at line {number}, column {error.colno}: {error.msg}; "
                "a .jsonl file holds one object per line"
            ) from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}: line {number} is not a JSON record: {error}") from error
        entries.append((f"{path}:record {len(entries)} (line {number})", entry))
    return entries


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start} ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror or error}") from error


def _require_encodable(text: str, where: str) -> None:
    """JSON may hold half of a surrogate pair ("\\ud83d"), which no tokenizer and no file system can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} is a lone surrogate ({text[error.start]!r}), half of a broken emoji or "
            "rare character; repair or remove it"
        ) from error


def _shown(value: Any) -> str:
    """A value short enough for a message, with its type where that is the fault."""
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}…"
    return text if isinstance(value, str) or value is None else f"{text} ({type(value).__name__})"
