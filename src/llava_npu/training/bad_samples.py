"""Bad samples that a run skipped: each one named in the terminal and in bad_samples.jsonl, and not too many of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.text import Text

from llava_npu.config import RunConfig
from llava_npu.errors import UserError
from llava_npu.training.monitoring.jsonl import append_lines, read_lines, rewind_lines

BAD_SAMPLES = "bad_samples.jsonl"


def report_bad_samples(
    config: RunConfig, step: int, problems: Sequence[str], accelerator: Accelerator, console: Console
) -> None:
    """Names the samples that were replaced in a step, on any process; every process calls it.

    Raises:
        UserError: see `refuse_too_many`.
    """
    gathered = gather_object(list(problems))
    if accelerator.is_main_process:
        note_bad_samples(config.output_path, step, gathered, console)
    accelerator.wait_for_everyone()
    refuse_too_many(config.output_path, config.data.max_bad_samples)


def note_bad_samples(folder: Path, step: int, problems: Sequence[str], console: Console) -> None:
    """Adds a step's replaced samples to the run's list."""
    append_lines(folder / BAD_SAMPLES, [{"step": step, "problem": problem} for problem in problems])
    for problem in problems:
        console.print(Text(f"step {step}: skipped {problem}", style="yellow"))


def refuse_too_many(folder: Path, limit: int) -> None:
    """Raises `UserError` where the run's list, that of earlier starts included, is longer than `limit`."""
    count = len(read_lines(folder / BAD_SAMPLES))
    if count > limit:
        raise UserError(
            f"{count} bad samples were replaced, more than data.max_bad_samples ({limit}); they are listed in "
            f"{folder / BAD_SAMPLES}. Repair or remove them (`llava-npu data check` finds all), or raise the limit."
        )


def rewind_bad_samples(folder: Path, step: int) -> None:
    """Drops what was noted after `step`: a continued run meets those samples again."""
    rewind_lines(folder / BAD_SAMPLES, step)
