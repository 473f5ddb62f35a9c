"""Writing files and folders so that readers see either the old one or the whole new one, whatever interrupts it.

Whatever is written gets the permissions that the umask gives to every other new file.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from llava_npu.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that appears complete or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file next to `path` to write to; it is synced to disk and renamed to `path` at the end.

    Raises:
        UserError: it cannot be written; `path` is then what it was before.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        _set_mode(temporary, mode)
        _sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {_reason(error)}.") from error
    finally:
        with suppress(OSError):  # a folder that is not there, or that cannot be written
            temporary.unlink()


def write_folder(
    folder: Path,
    fill: Callable[[Path], None],
    *,
    resume: bool = False,
    advice: str = "Free some space, or choose another folder",
) -> None:
    """Writes a folder that appears complete or not at all, in place of one that may be there.

    `fill` gets a folder next to it, `.NAME.partial`, so only one process at a time may write the same folder.

    Args:
        fill: puts the files into the folder it is given.
        resume: `fill` finds what an interrupted attempt left, and what it has done stays if it is interrupted.
        advice: what to do when the disk is full.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    partial = partial_path(folder)
    try:
        with explaining(folder, advice):
            if not resume:
                start_folder(folder)
            partial.mkdir(parents=True, exist_ok=True)
            fill(partial)
            finish_folder(folder)
    finally:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)


def start_folder(folder: Path) -> Path:
    """Makes the empty folder that will become `folder`: `write_folder` in parts, where several processes fill it."""
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(folder: Path) -> None:
    """Syncs what `start_folder` began to disk, and gives it its name, in place of a folder that may have it."""
    partial = partial_path(folder)
    settle(partial)
    _swap(partial, folder)


@contextmanager
def explaining(folder: Path, advice: str) -> Iterator[None]:
    """Turns what goes wrong while `folder` is written into a `UserError`; `advice` is for a full disk."""
    partial = partial_path(folder)
    try:
        yield
    except (OSError, SafetensorError) as error:
        described = _describe(error, folder, partial, advice)
        if described is None:  # not about this folder: something could not be read
            raise
        raise described from error


def partial_path(folder: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return folder.with_name(f".{folder.name}.partial")


def settle(folder: Path) -> None:
    """Syncs all files to disk, with the permissions of the umask (safetensors and mkstemp keep others out)."""
    mode = folder.stat().st_mode & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        if path.is_file():
            _set_mode(path, mode)
        _sync(path)


def _swap(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old.partial")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode & 0o777 != mode & 0o777:
        path.chmod(mode & 0o777)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(error: OSError | SafetensorError, folder: Path, partial: Path, advice: str) -> UserError | None:
    number = _number(error)
    if number is None:
        return None
    if number in _DISK_FULL:
        free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
        return UserError(
            f"{folder}: no space left on the disk, or none for this user ({os.strerror(number)}; "
            f"{free / 2**30:.1f} GiB free). Nothing half-written was kept. {advice}."
        )
    place = str(getattr(error, "filename", None) or partial)
    if isinstance(error, SafetensorError) or Path(place).is_relative_to(partial) or Path(place) in partial.parents:
        return UserError(f"{folder}: cannot be written: {_reason(error)}. Choose another folder.")
    return None


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number for what went wrong; safetensors writes it into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _reason(error: OSError | SafetensorError) -> str:
    return getattr(error, "strerror", None) or str(error)
