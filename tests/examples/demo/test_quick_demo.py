"""The main job for real: `python examples/demo --quick` on real weights and images, from packages to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[3] / "examples/demo"


@pytest.mark.slow
@pytest.mark.network
def test_the_quick_demo_works(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    result = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--output", str(output), "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )
    if result.returncode == 2 and "fetch" in result.stderr and not (output / "data").exists():
        pytest.skip(f"the packages cannot be fetched here: {result.stderr[-500:]}")
    assert result.returncode == 0, result.stderr[-3000:]
    measured = {
        state: json.loads((output / "measured" / state / "measured.json").read_text())
        for state in ("untrained", "aligned", "tuned")
    }
    answers = [json.loads(line) for file in output.rglob("predictions.jsonl") for line in file.open()]
    assert len(answers) >= 100
    assert {answer["error"] for answer in answers} == {None}
    # So few steps teach what captions look like; that the picture tells is for the default size to show. The first of
    # them are chaotic: rounding on another processor (bfloat16 with AMX) left the loss at 6.2, where others reach 4.3.
    losses = {state: found["caption loss"] for state, found in measured.items()}
    assert losses["aligned"]["given"]["value"] < losses["untrained"]["given"]["value"] - 0.5
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "not CLIP" in page
    assert page.count("data:image/jpeg;base64,") >= 12  # a picture of each example
    assert (output / "finetune/model/model.safetensors").is_file()
    assert "llava-npu chat" in result.stderr + result.stdout
