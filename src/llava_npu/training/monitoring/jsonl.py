"""Files of a run that hold one JSON object a line, each with the step that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.json_objects import read_json_lines

NONFINITE_STEPS = "nonfinite_steps.jsonl"
REPLAYS = "nonfinite"  # a folder for each batch that was saved
_ADVICE = "Delete that line, or start the run over with --fresh"


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to a file.

    Raises:
        UserError: they cannot be written, as on a full disk.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}. Free some space and start the same command again: "
            "it continues from the newest checkpoint."
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """See `read_json_lines`; a line that names no step is an error, too."""
    lines = read_json_lines(path, _ADVICE)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise UserError(f"{path}, line {number}: has no `step`. {_ADVICE}.")
    return lines


def rewind_lines(path: Path, step: int) -> None:
    """Drops the lines after `step`: a continued run writes them again."""
    if path.is_file():
        kept = (line for line in read_lines(path) if line["step"] <= step)
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
