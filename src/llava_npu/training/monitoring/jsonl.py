"""Files of a run that hold one JSON object a line, each with the step that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_npu.files.atomic import write_text

NONFINITE_STEPS = "nonfinite_steps.jsonl"
REPLAYS = "nonfinite"  # a folder for each batch that was saved


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; one cut short by an interruption is left out. None where there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def rewind_lines(path: Path, step: int) -> None:
    """Drops the lines after `step`: a continued run writes them again."""
    if path.is_file():
        kept = (line for line in read_lines(path) if line["step"] <= step)
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
