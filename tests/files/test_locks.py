"""Locks between processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_npu.errors import UserError
from llava_npu.files.locks import locked

_HOLDER = """
import sys, time
from pathlib import Path
from llava_npu.files.locks import locked
with locked(Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    return process


def test_another_process_is_kept_out_until_the_owner_is_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    try:
        with (
            pytest.raises(UserError, match=r"^somebody is at work$"),
            locked(tmp_path / "lock", busy="somebody is at work"),
        ):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with locked(tmp_path / "lock", busy="somebody is at work"):
        pass


def test_a_folder_in_place_of_the_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock is a folder, and has to be a lock file: remove it"):
        locked(tmp_path / ".lock").__enter__()


def test_a_file_system_without_locks_lets_everyone_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "lock"), locked(tmp_path / "other"):
        pass
