"""Users without a home folder: containers run under ids that no list of users knows."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from llava_npu.diagnostics import machine
from llava_npu.errors import UserError
from llava_npu.files.cache import cache_root
from llava_npu.files.home import expand_home


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "LLAVA_NPU_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_only_paths_that_need_a_home_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert expand_home("a/~b") == Path("a/~b")
    with pytest.raises(UserError, match=r"~/data\.json: this user has no home folder .* Set HOME"):
        expand_home("~/data.json")
    with pytest.raises(UserError, match="set LLAVA_NPU_CACHE"):
        cache_root()
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path))
    assert cache_root() == tmp_path


def test_doctor_looks_at_what_there_is() -> None:
    assert "cache" not in {disk.purpose for disk in machine._disks()}
    machine._cann_folder()
