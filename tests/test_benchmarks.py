"""Every benchmark starts; that of training runs at tiny size, and its ways have equal losses (else it fails)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.benchmark_scripts import load_benchmark

ROOT = Path(__file__).resolve().parent.parent


STARTED = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser" in path.read_text())


@pytest.mark.parametrize("name", STARTED)
def test_benchmarks_say_how_they_are_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        load_benchmark(name).main()
    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


@pytest.mark.slow
def test_training_benchmark(device: torch.device) -> None:
    command = [sys.executable, "benchmarks/training.py", "--device", device.type, "--shape", "tiny"]
    sizes = ["--batch", "8", "--micro-batch", "4", "--pack-tokens", "512", "--steps", "2", "--rounds", "1"]
    result = subprocess.run(
        [*command, *sizes],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    assert "all losses equal within 0.0002" in result.stdout
    assert "speed against theirs: padded" in result.stdout
