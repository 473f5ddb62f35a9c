"""`pytest --simulated-npu`: which tests run where, and what makes a run fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

TESTS = """
def test_on_the_device(device):
    assert device.type in ("cpu", "cuda", "npu")

def test_a_call_that_the_real_operator_would_not_take(device):
    if device.type == "npu":
        from torch_npu.simulation import recording

        recording.record("npu_swiglu", ("a string",), {"axis": 1})

def test_without_a_device():
    pass
"""


def pytest_run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest in a copy of this repository's test configuration, without the environment of this run."""
    ours = ("SIMULATED_NPU_", "PYTEST_", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of tests under this repository's conftest.py."""
    (tmp_path / "test_sample.py").write_text(TESTS)
    return tmp_path


def own_configuration(folder: Path) -> list[str]:
    return [f"--confcutdir={folder}", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest"]


def test_machine_without_npu(folder: Path) -> None:
    run = pytest_run(folder, *own_configuration(folder))
    assert "test_on_the_device[cpu] PASSED" in run.stdout
    assert "test_without_a_device PASSED" in run.stdout
    assert "[npu]" not in run.stdout
    assert run.returncode == 0


def test_simulated_machine(folder: Path) -> None:
    """With parallel workers, whose records must all be found at the end."""
    run = pytest_run(folder, *own_configuration(folder), "--simulated-npu", "-n", "2")
    assert "device: Ascend910B3 (simulated), 2 of them" in run.stdout
    assert re.search(r"PASSED .*test_on_the_device\[npu\]", run.stdout)
    assert "[cpu]" not in run.stdout
    assert "test_without_a_device" not in run.stdout
    assert "2 passed" in run.stdout
    if "not checked: " in run.stdout:
        pytest.skip("the real wheel cannot be had: its schemas are not there to compare with")
    assert "npu_swiglu('str', 'axis: int'): it has no argument 'axis'" in run.stdout
    assert "npu_swiglu('str', 'axis: int'): 'self' is str, it takes Tensor" in run.stdout
    assert run.returncode == 1
