"""Bad samples that a run skipped: each one named in the terminal and in bad_samples.jsonl, and not too many of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llava_npu.errors import UserError

BAD_SAMPLES = "bad_samples.jsonl"


def note_bad_samples(folder: Path, step: int, problems: Sequence[str], console: Console) -> None:
    """Adds a step's replaced samples to the run's list."""
    with (folder / BAD_SAMPLES).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "problem": problem}) + "\n" for problem in problems)
    for problem in problems:
        console.print(Text(f"step {step}: skipped {problem}", style="yellow"))


def refuse_too_many(folder: Path, limit: int) -> None:
    """Raises UserError where the run's list, that of earlier starts included, is longer than `limit`."""
    count = len(_lines(folder))
    if count > limit:
        raise UserError(
            f"{count} bad samples were replaced, more than data.max_bad_samples ({limit}); they are listed in "
            f"{folder / BAD_SAMPLES}. Repair or remove them (`llava-npu data check` finds all), or raise the limit."
        )


def rewind_bad_samples(folder: Path, step: int) -> None:
    """Drops what was noted after `step`: a continued run meets those samples again."""
    path = folder / BAD_SAMPLES
    if path.is_file():
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(line for line in _lines(folder) if json.loads(line)["step"] <= step))
        partial.replace(path)


def _lines(folder: Path) -> list[str]:
    """The complete lines; one cut short by an interruption is left out."""
    path = folder / BAD_SAMPLES
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]
