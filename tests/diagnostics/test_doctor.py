"""The command: what it prints, its JSON, its exit status, and that it needs nothing but itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_npu.cli import app
from llava_npu.diagnostics import doctor
from llava_npu.diagnostics.machine import Machine

MakeMachine = Callable[..., Machine]


def _run(machine: Machine, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    monkeypatch.setattr(doctor, "look", lambda timeout: machine)
    return CliRunner().invoke(app, ["doctor", *options])


def test_all_well(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run(machine(), monkeypatch)
    assert result.exit_code == 0
    assert "0 errors, 0 warnings" in result.output
    assert "Ascend910B3, 63.0 of 64.0 GiB free, bfloat16" in result.output
    assert "fix:" not in result.output


def test_errors_are_explained_and_make_it_fail(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run(machine(versions={"torch": "2.8.0"}), monkeypatch)
    assert result.exit_code == 1
    assert "1 error, 0 warnings" in result.output
    assert "fix: pip install torch==2.9.0+cpu torch-npu==2.9.0.post6" in result.output


def test_warnings_alone_do_not(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(machine(environment={"ASCEND_LAUNCH_BLOCKING": "1"}), monkeypatch).exit_code == 0


def test_json(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run(machine(versions={"torch": "2.8.0"}), monkeypatch, "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert {"format", "llava_npu", "simulated", "errors", "warnings", "findings", "machine"} == report.keys()
    assert (report["errors"], report["warnings"], report["simulated"]) == (1, 0, False)
    for finding in report["findings"]:
        assert finding.keys() == {"check", "level", "what", "why", "fix"}
        assert finding["level"] in ("ok", "warning", "error")
    assert report["machine"]["ascend"]["cann"] == "9.1.0"
    assert report["machine"]["trial"]["devices"][1]["device"] == "npu:1"


@pytest.mark.slow
def test_on_this_machine_without_transformers_and_with_a_broken_torch(tmp_path: Path) -> None:
    """Everything heavy raises on import, here and in the probe; `doctor` reports torch and needs none of it."""
    for name in ("torch", "transformers", "numpy", "accelerate", "psutil"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from llava_npu.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "doctor", "--json"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    errors = [finding for finding in json.loads(result.stdout)["findings"] if finding["level"] == "error"]
    assert [(finding["check"], "torch is broken" in finding["what"]) for finding in errors] == [("torch", True)]
