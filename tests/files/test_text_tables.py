"""Tables of text in narrow terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llava_npu.files.tables import TextTable

HEADS = [
    "projector",
    "visual tokens\n",
    "mmbench\n%",
    "first token\nms",
    "projector\nM parameters",
    "loss\nnats per token",
]
ROWS = [["resampler", "144", "25.0\n(6.2–50.0)", "100\n(98–106)", "0.01", "5.99"]]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_column_vanishes(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(TextTable(HEADS, ROWS).as_terminal())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    for cell in ["resampler", "144", "25.0", "(6.2–50.0)", "(98–106)", "0.01", "5.99"]:
        assert cell in shown, shown
