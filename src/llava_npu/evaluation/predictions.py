"""Predictions on disk: one JSON object a line, appended batch by batch, each batch on the disk before the next begins.

A process that is killed, even by `kill -9`, loses at most the batch in flight. Its last line may be torn; reading
ignores it and says so, and writing continues after the last whole line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text


@dataclass(frozen=True)
class Prediction:
    """One answered question, as it is stored.

    Attributes:
        id: of the question.
        prompt, answer: what the model was given and what it answered.
        parsed: what each extraction rule read from the answer.
        truth: the right answer, None where it is secret.
        seconds: the batch's time divided by its questions.
        error: why the answer is missing, if it is.
        scores: log-probability of each option, where the answer was chosen by likelihood.
        image_files: fingerprint of the image files that were shown (see `fingerprints`).
    """

    id: str
    prompt: str
    answer: str
    parsed: dict[str, str | None]
    truth: str | None
    seconds: float
    error: str | None = None
    scores: Mapping[str, float] | None = None
    image_files: str | None = None


_FIELDS = frozenset(Prediction.__dataclass_fields__)
_MAY_LACK = frozenset({"image_files"})  # runs from before it was recorded can be resumed


def read_predictions(path: Path) -> tuple[list[Prediction], int]:
    """Reads the predictions written so far.

    Returns:
        the predictions, and how many bytes of the file hold whole lines; what is behind is a torn last line.

    Raises:
        UserError: a line before the last is not a prediction, or a question was answered twice.
    """
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    predictions: list[Prediction] = []
    lines_of: dict[str, int] = {}
    start = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        is_last = start + len(line) == len(data)
        if is_last and not line.endswith(b"\n"):
            break
        prediction = _parse(line)
        if prediction is None:
            if is_last:
                break
            raise UserError(
                f"{path}, line {number}: not a prediction. The file was changed or damaged; start over with --fresh."
            )
        if prediction.id in lines_of:
            raise UserError(
                f"{path}, line {number}: question {prediction.id} was already answered in line "
                f"{lines_of[prediction.id]}. Did two runs write here at once? Start over with --fresh."
            )
        lines_of[prediction.id] = number
        predictions.append(prediction)
        start += len(line)
    return predictions, start


def replace_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Rewrites the file atomically."""
    write_text(path, _as_lines(predictions))


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Appends and waits until the disk has it."""
    text = _as_lines(predictions)
    try:
        with path.open("ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}. What was answered before is kept; run again to go on."
        ) from error


def cut_torn_line(path: Path, whole: int) -> int:
    """Cuts the file behind its whole lines; returns how many bytes went."""
    if not path.exists():
        return 0
    torn = path.stat().st_size - whole
    if torn:
        os.truncate(path, whole)
    return torn


def _as_lines(predictions: Iterable[Prediction]) -> str:
    lines = "".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", lines)  # as JSON escapes them


def _parse(line: bytes) -> Prediction | None:
    try:
        values = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    if not isinstance(values, dict) or not _FIELDS - _MAY_LACK <= values.keys() <= _FIELDS:
        return None
    return Prediction(**values)
