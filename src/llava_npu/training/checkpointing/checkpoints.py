"""Checkpoints that are whole or not there: written to a temporary folder, synced, renamed last, verified before use.

A checkpoint is a folder `checkpoint-000500`. It is written as `.checkpoint-000500.partial`, its manifest (sizes and
SHA-256 of every file) last, all synced to disk, and then renamed: a folder with the final name is complete. What an
interruption leaves behind keeps its `.partial` name, is never read, and is removed by the next run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.files import atomic
from llava_npu.files.json_objects import read_json

MANIFEST = "manifest.json"
_ADVICE = (
    "Free some space, or choose another `output`, and start the same command again: it continues from the newest "
    "checkpoint"
)
_NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: after how many steps, and where."""

    step: int
    path: Path


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Writes a folder that appears whole or not at all, with a manifest; `fill` puts the files into it.

    Raises:
        UserError: the disk is full, or cannot be written; nothing half-written stays.
    """

    def fill_and_list(partial: Path) -> None:
        fill(partial)
        manifest = {str(file.relative_to(partial)): _fingerprint(file) for file in _files(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))

    atomic.write_folder(path, fill_and_list, advice=_ADVICE)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints in a run folder, the newest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((Checkpoint(int(match[1]), path) for match, path in found if match), key=lambda each: -each.step)


def verify(path: Path) -> str | None:
    """None if the folder holds exactly what its manifest says, else what is wrong with it."""
    try:
        manifest = read_json(path / MANIFEST, advice="The checkpoint is damaged")
    except UserError as error:
        return str(error)
    if not manifest:
        return f"{MANIFEST} lists no file"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != expected:
            return f"{name} is damaged (its size or checksum differs from the manifest)"
    return None


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are reported and passed over."""
    for checkpoint in checkpoints(folder):
        problem = verify(checkpoint.path)
        if problem is None:
            return checkpoint
        report(f"{checkpoint.path}: {problem}; using an older checkpoint")
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps belongs."""
    return folder / f"checkpoint-{step:06d}"


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and what interruptions left behind."""
    for checkpoint in checkpoints(folder)[keep:]:
        # Renamed first, so that a deletion cut short leaves no folder that looks complete.
        doomed = atomic.partial_path(checkpoint.path)
        checkpoint.path.rename(doomed)
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fingerprint(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
