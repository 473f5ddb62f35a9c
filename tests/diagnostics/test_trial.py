"""Whatever breaks, crashes or hangs in torch or a device's software is a fact, never the end of `doctor`."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from llava_npu.diagnostics.trial import MARK, read, try_torch

CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"


def _package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_a_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, "torch", "raise OSError('libgomp.so.1: cannot open\\n shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    trial = try_torch(300, has_backend=False)
    assert trial.torch is None
    assert trial.torch_error == "libgomp.so.1: cannot open shared object file"
    assert trial.devices == ()


def test_a_torch_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, "torch", CRASH)
    monkeypatch.syspath_prepend(tmp_path)
    assert try_torch(300, has_backend=False).died == "import torch: crashed (SIGSEGV)"


def test_a_torch_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = tmp_path / "hangs"
    code = f"import time\nprint('library chatter', flush=True)\nopen({str(hangs)!r}, 'w')\ntime.sleep(3600)\n"
    _package(tmp_path, "torch", code)
    monkeypatch.syspath_prepend(tmp_path)
    communicate = subprocess.Popen.communicate

    def once_it_hangs(process: subprocess.Popen[str], timeout: float | None = None) -> tuple[str, str]:
        while timeout and not hangs.exists():
            assert process.poll() is None
            time.sleep(0.01)
        return communicate(process, timeout=timeout and 0.1)

    monkeypatch.setattr(subprocess.Popen, "communicate", once_it_hangs)
    assert try_torch(20, has_backend=False).died == "import torch: no answer within 20 s"


@pytest.mark.slow
def test_a_torch_npu_that_crashes_leaves_the_cpu_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, "torch_npu", CRASH)
    monkeypatch.syspath_prepend(tmp_path)
    trial = try_torch(300, has_backend=False)
    assert trial.torch
    assert trial.died == "use npu devices: crashed (SIGSEGV)"


@pytest.mark.slow
def test_a_torch_npu_that_breaks_torch_by_autoloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, "torch_npu", "raise ImportError('libhccl.so: cannot open shared object file')\n")
    metadata = tmp_path / "torch_npu-2.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.9.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    monkeypatch.syspath_prepend(tmp_path)
    trial = try_torch(300, has_backend=True)
    assert trial.autoload_breaks_torch
    assert "libhccl.so" in trial.torch_error
    assert trial.torch  # without autoloading, it works
    assert "libhccl.so" in trial.broken["npu"]
    assert [device.device for device in trial.devices if not device.accelerator] == ["cpu"]


@pytest.mark.slow
def test_a_global_hook_is_seen_wherever_it_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, "torch_npu", "")
    _package(tmp_path / "torch_npu", "contrib", "")
    (tmp_path / "torch_npu/contrib/transfer_to_npu.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import torch_npu.contrib.transfer_to_npu")
    monkeypatch.syspath_prepend(tmp_path)
    trial = try_torch(300, has_backend=False)
    assert ["transfer_to_npu is active" in warning for warning in trial.warnings] == [True]


def test_what_libraries_print_is_not_taken_for_facts() -> None:
    output = f'{{"torch": "9"}}\n{MARK}{{"stage": "import torch"}}\nchatter\n{MARK}{{"torch": "2.9"}}\n'
    trial = read(output, "")
    assert trial.torch == "2.9"
    assert trial.died == ""


def test_where_it_died_is_the_last_thing_it_said() -> None:
    output = f'{MARK}{{"stage": "import torch"}}\n{MARK}{{"torch": "2.9"}}\n{MARK}{{"stage": "use npu devices"}}\n'
    assert read(output, "crashed (SIGABRT)").died == "use npu devices: crashed (SIGABRT)"
