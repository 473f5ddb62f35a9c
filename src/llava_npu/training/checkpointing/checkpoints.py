"""Checkpoints that are complete or not there: written under another name, synced, renamed last, verified before use.

A checkpoint is a folder `checkpoint-000500`. It is written as `.checkpoint-000500.partial`, its manifest (sizes and
SHA-256 of every file) last, all synced to disk, and then renamed: a folder with the final name is complete. What an
interruption leaves behind keeps its `.partial` name, is never read, and is removed by the next run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.files import atomic
from llava_npu.files.json_objects import read_json

MANIFEST = "manifest.json"
LINKS = "checkpoints"  # a folder of links: to the newest checkpoint, and to that with the lowest validation loss
LATEST, BEST = "latest", "best"
Fingerprint = dict[str, int | str]

ADVICE = (  # where the disk is full
    "Free some space, or choose another `output`, and start the same command again: it continues from the newest "
    "checkpoint"
)
_NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A complete checkpoint: after how many steps, and where."""

    step: int
    path: Path


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Writes a folder that appears complete or not at all, with a manifest; `fill` puts the files into it.

    Raises:
        UserError: the disk is full, or cannot be written; nothing half-written stays.
    """

    def fill_and_list(partial: Path) -> None:
        fill(partial)
        write_manifest(partial, {})

    atomic.write_folder(path, fill_and_list, advice=ADVICE)


def write_manifest(folder: Path, known: Mapping[str, Fingerprint]) -> None:
    """Lists the size and checksum of every file in the folder.

    Args:
        known: those that other processes have computed of what they wrote there.

    Raises:
        UserError: a file of another process is not there.
    """
    files = {str(file.relative_to(folder)): file for file in _files(folder)}
    if unseen := sorted(known.keys() - files.keys()):
        raise UserError(
            f"output: {unseen[0]}, which another process wrote into {folder}, is not there for the main process. Give "
            "an `output` that all machines of the run share."
        )
    manifest = {name: known.get(name) or fingerprint(file) for name, file in files.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def checkpoints(folder: Path) -> list[TrainingCheckpoint]:
    """Complete checkpoints in a run folder, the newest first."""
    found = map(checkpoint_of, folder.glob("checkpoint-*"))
    return sorted((each for each in found if each is not None), key=lambda each: -each.step)


def checkpoint_of(path: Path) -> TrainingCheckpoint | None:
    """The checkpoint that a folder is, if it has the name of one."""
    match = _NAME.fullmatch(path.name)
    return TrainingCheckpoint(int(match[1]), path) if match and path.is_dir() else None


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """None if the folder holds what its manifest says, else what is wrong with it.

    Args:
        share: (which, of how many) equal parts of the files are looked at.
    """
    try:
        manifest = read_json(path / MANIFEST, advice="The checkpoint is damaged")
    except UserError as error:
        return str(error)
    if not manifest:
        return f"{MANIFEST} lists no file"
    for name, expected in sorted(manifest.items())[share[0] :: share[1]]:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if fingerprint(file) != expected:
            return f"{name} is damaged, or of another run (its size or checksum differs from the manifest)"
    return None


def newest(
    found: Sequence[TrainingCheckpoint],
    report: Callable[[str], None],
    problem_of: Callable[[Path], str | None] = verify,
) -> TrainingCheckpoint | None:
    """The first of these checkpoints that verifies; damaged ones are reported and passed over.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    for checkpoint in found:
        problem = problem_of(checkpoint.path)
        if problem is None:
            return checkpoint
        if checkpoint == found[-1]:
            raise UserError(
                f"{checkpoint.path}: {problem}. No other checkpoint in {checkpoint.path.parent} is complete. Put the "
                "file back, or start over with --fresh."
            )
        report(f"{checkpoint.path}: {problem}; using an older checkpoint")
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps belongs."""
    return folder / f"checkpoint-{step:06d}"


def link(folder: Path, name: str, checkpoint: TrainingCheckpoint) -> None:
    """Points `checkpoints/NAME` of a run folder to one of its checkpoints."""
    path = folder / LINKS / name
    new = path.with_name(f".{name}.new")
    with suppress(OSError):  # some file systems have no links; a run does not need them
        path.parent.mkdir(exist_ok=True)
        new.unlink(missing_ok=True)
        new.symlink_to(Path("..") / checkpoint.path.name)
        new.replace(path)


def linked(folder: Path, name: str) -> TrainingCheckpoint | None:
    """The checkpoint that `checkpoints/NAME` of a run folder points to, if it is there."""
    path = folder / LINKS / name
    target = path.readlink().name if path.is_symlink() else None
    return next((each for each in checkpoints(folder) if each.path.name == target), None)


def prune(folder: Path, keep: int, spare: TrainingCheckpoint | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints and `spare`, and what interruptions left behind."""
    for checkpoint in checkpoints(folder)[keep:]:
        if checkpoint == spare:
            continue
        # Renamed first, so that a deletion cut short leaves no folder that looks complete.
        doomed = atomic.partial_path(checkpoint.path)
        checkpoint.path.rename(doomed)
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    links = folder / LINKS
    if links.is_dir():
        for path in links.iterdir():
            if not path.exists():
                path.unlink()
        if not any(links.iterdir()):
            links.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def fingerprint(file: Path) -> Fingerprint:
    """The size of a file and the SHA-256 of its content."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
