"""The user's cache: folders that are either complete or absent, whoever else is building them at the same time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_folder, write_text
from llava_npu.files.home import expand_home
from llava_npu.files.locks import locked
from llava_npu.version import __version__

_SIZES = ".sizes.json"  # of every file of a built folder, so that damage is seen
_ADVICE = "Free some space, or point LLAVA_NPU_CACHE to a folder that can be written"


def cache_root() -> Path:
    """`$LLAVA_NPU_CACHE`, else `$XDG_CACHE_HOME/llava-npu`, else `~/.cache/llava-npu`."""
    if chosen := os.environ.get("LLAVA_NPU_CACHE"):
        return expand_home(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_home(base).resolve() / "llava-npu"


def digest_of(*facts: Any) -> str:
    """A name in the cache for what this version makes of some facts, which JSON can hold."""
    return hashlib.sha256(json.dumps([__version__, *facts]).encode()).hexdigest()[:16]


def build_once(
    folder: Path, build: Callable[[Path], None], is_whole: Callable[[Path], bool] = lambda folder: True
) -> Path:
    """Returns `folder`, building it first if it is absent, or again if it is damaged.

    `build` fills a temporary folder next to it, which is renamed when complete: an interrupted build leaves nothing
    behind that looks finished. A lock lets one of several processes build while the others wait. Damaged is what lacks
    a file, or has one of another size than was written; `is_whole` may look closer.
    """

    def is_usable() -> bool:
        return folder.is_dir() and _has_its_files(folder) and is_whole(folder)

    def build_and_measure(target: Path) -> None:
        build(target)
        write_text(target / _SIZES, json.dumps(_sizes(target)))

    if is_usable():
        return folder
    try:
        with locked_in_cache(folder.parent / f".{folder.name}.lock"):
            if not is_usable():
                write_folder(folder, build_and_measure, advice=_ADVICE)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


@contextmanager
def locked_in_cache(lock: Path) -> Iterator[None]:
    """Makes the folder of a lock file in the cache, and holds the lock: another process that needs it waits.

    Raises:
        UserError: it cannot be written.
    """
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock))
        except OSError as error:
            raise _unwritable(lock.parent, error) from error
        yield


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the cache folder {folder}: {error.strerror or error}. {_ADVICE}.")


def _sizes(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def _has_its_files(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _SIZES).read_bytes()).items() <= _sizes(folder).items())
    except (OSError, ValueError, AttributeError):
        return False
