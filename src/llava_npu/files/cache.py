"""The user's cache: folders that are either complete or absent, whoever else is building them at the same time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_npu.errors import UserError


def cache_root() -> Path:
    """`$LLAVA_NPU_CACHE`, else `$XDG_CACHE_HOME/llava-npu`, else `~/.cache/llava-npu`."""
    if chosen := os.environ.get("LLAVA_NPU_CACHE"):
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "llava-npu"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, building it first if it is absent.

    `build` fills a temporary folder beside it, which is renamed when complete: an interrupted build leaves nothing
    behind that looks finished. A file lock lets one of several processes build while the others wait.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                _build(folder, build)
    except OSError as error:
        raise UserError(
            f"cannot write the cache folder {folder}: {error.strerror or error}. "
            "Free some space, or point LLAVA_NPU_CACHE to a folder that can be written."
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(unfinished)
        unfinished.chmod(0o755)  # mkdtemp keeps others out
        for path in unfinished.rglob("*"):
            if path.is_file():
                _flush(path)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file lock: one process at a time is inside, on this machine or on a shared disk that knows locks."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


@contextmanager
def locked_or_busy(path: Path, busy: str) -> Iterator[None]:
    """As `locked`, but where another process is inside, a `UserError` that says `busy`."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{busy}. Wait for it, or stop it.") from None
        yield
