"""Locks between processes, held by the system: whatever ends their owner frees them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llava_npu.errors import UserError

LOCK = ".lock"  # its usual name inside of a folder
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems, as some that are mounted over a network


@contextmanager
def locked(path: Path, *, busy: str | None = None, patience: float = 0) -> Iterator[None]:
    """Holds a lock file: one process at a time is inside, on this machine or on a shared disk that knows locks.

    Args:
        path: the lock file, which stays.
        busy: what to say if another process is inside; None: wait for it.
        patience: seconds to wait before saying so, for a process that was just killed and may take a moment to end.

    Raises:
        UserError: another process is inside, or `path` is a folder.
    """
    lock = FileLock(path, timeout=-1 if busy is None else patience)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{busy}") from None
    except OSError as error:
        if path.is_dir():
            raise UserError(f"{path} is a folder, and has to be a lock file: remove it, and start again.") from error
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()
