"""The backend is compiled once, by one process, and a machine that cannot compile is told why."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from pathlib import Path

import pytest
from torch_npu import _build


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIMULATED_NPU_BUILD_DIR", str(tmp_path))
    return tmp_path


def finished_library() -> Path:
    """The one that this process runs on."""
    return Path(sys.modules["torch_npu._C"].__file__ or "")


def test_loaded_from_the_cache_under_its_fingerprint() -> None:
    assert finished_library() == _build.cache_dir() / _build.fingerprint() / "_C.so"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SIMULATED_NPU_BUILD_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _build.cache_dir() == tmp_path / "llava-npu" / "simulated-npu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _build.cache_dir() == Path.home() / ".cache" / "llava-npu" / "simulated-npu"


def test_fingerprint_follows_sources_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = _build.fingerprint()
    monkeypatch.setenv("CXX", "another-compiler")
    assert _build.fingerprint() != original
    monkeypatch.undo()
    for path in _build.SOURCE_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(_build, "SOURCE_DIR", tmp_path)
    assert _build.fingerprint() == original
    (tmp_path / "device.cpp").write_text("// changed")
    assert _build.fingerprint() != original


def test_several_at_once_compile_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_slowly(folder: Path) -> None:
        compiled.append(folder)
        time.sleep(0.3)
        folder.mkdir()
        (folder / "_C.so").symlink_to(finished_library())

    finished = finished_library()
    monkeypatch.setattr(_build, "_compile_into", compile_slowly)
    monkeypatch.setattr(sys.modules[__name__], "finished_library", lambda: finished)
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(_build.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 4
    assert compiled == [empty_cache / _build.fingerprint()]


def test_without_a_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_build.BuildError, match=r"lacks the C\+\+ compiler 'no-such-compiler' \(.*apt install g\+\+"):
        _build.load()
    assert not any(empty_cache.glob("*.building-*"))


def test_without_ninja(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ninja" else real(name, *a))
    monkeypatch.setattr(_build.shutil, "which", lambda name: None if name == "ninja" else f"/usr/bin/{name}")
    with pytest.raises(_build.BuildError, match=r"lacks ninja \(pip install ninja\)"):
        _build.load()


def test_sources_that_do_not_compile(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")  # a compiler that always fails
    with pytest.raises(_build.BuildError, match="did not compile"):
        _build.load()
    assert not any(path.is_dir() for path in empty_cache.iterdir())
