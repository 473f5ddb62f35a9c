"""The benchmark of training runs at tiny size, and its ways have equal losses (it fails where they have not)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


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
