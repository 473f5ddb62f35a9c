"""The user's cache: folders that are either complete or absent, whoever else is building them at the same time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_folder
from llava_npu.files.home import expand_home
from llava_npu.files.locks import locked
from llava_npu.version import __version__

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
    behind that looks finished. A lock lets one of several processes build while the others wait.
    """
    if folder.is_dir() and is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if not (folder.is_dir() and is_whole(folder)):
                write_folder(folder, build, advice=_ADVICE)
    except OSError as error:
        raise UserError(f"cannot write the cache folder {folder}: {error.strerror or error}. {_ADVICE}.") from error
    return folder
