"""Writing a file so that readers see either the old one or the whole new one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from llava_npu.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to a temporary file beside `path`, waits for the disk, and renames it.

    Raises:
        UserError: it cannot be written.
    """
    partial: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            partial = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
