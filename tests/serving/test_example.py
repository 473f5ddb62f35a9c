"""The example runs, and its doors lead to the same answer."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "use_a_model.py"


@pytest.mark.slow
def test_the_example(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 30), (200, 0, 0)).save(tmp_path / "red.png")
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(model_folder), str(tmp_path / "red.png")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = [line.partition(":") for line in capsys.readouterr().out.splitlines() if ":" in line]
    said = [(name, ast.literal_eval(value.strip())) for name, _, value in lines if value.strip()[:1] in "'\"["]
    answers = dict(reversed(said))  # of the conversation, the first answer
    assert set(answers) == {"pipeline", "Auto classes", "answer_all", "conversation"}
    assert answers["answer_all"][0] == answers["conversation"]
    assert answers["pipeline"].strip() == answers["Auto classes"].strip() == answers["conversation"]
