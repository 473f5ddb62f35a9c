"""Numbers that come late are looked at late, and change nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from test_nonfinite import poisoned  # noqa: F401  a fixture

from llava_npu.config import RunConfig
from llava_npu.devices.cpu import CpuDevice
from llava_npu.devices.marks import HostMark
from llava_npu.training import train
from llava_npu.training.monitoring.jsonl import read_lines
from llava_npu.training.monitoring.metrics import read_metrics

MakeRun = Callable[..., RunConfig]
MEASURED = (
    "tokens_per_second",
    "samples_per_second",
    "tflops_per_device",
    "mfu",
    "input_wait",
    "seconds",
    "seconds_left",
)


class _Late(HostMark):
    """Is asked three times before it is reached."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.waited = False

    def reached(self) -> bool:
        self.asked += 1
        return self.waited or self.asked > 3

    def wait(self) -> None:
        self.waited = True


def _train(run: RunConfig) -> tuple[list[dict[str, Any]], str]:
    console = Console(file=io.StringIO(), width=500)
    train(run, console=console)
    lines = [
        {name: value for name, value in line.items() if name not in (*MEASURED, "peak_memory_gib")}
        for line in read_metrics(run.output_path)
    ]
    return lines, console.file.getvalue()  # type: ignore[attr-defined]


def test_late_numbers_change_nothing(
    make_run: MakeRun,
    poisoned: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {**poisoned, "micro_batch_size": 2, "batch_size": 4, "epochs": 2, "save_every": 5}
    prompt, late = make_run("prompt", **changes), make_run("late", **changes)
    if prompt.device != "cpu":
        pytest.skip("it is the marks that are late, whatever the device")
    lines, _ = _train(prompt)
    marks: list[_Late] = []

    def mark(device: CpuDevice) -> _Late:
        marks.append(_Late())
        return marks[-1]

    monkeypatch.setattr(CpuDevice, "mark", mark)
    late_lines, said = _train(late)
    assert late_lines == lines
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["skipped_steps"] == 2
    assert said.count("skipped, its gradient is not finite") == 2
    skipped = [read_lines(run.output_path / "nonfinite_steps.jsonl") for run in (prompt, late)]
    assert [line["step"] for line in skipped[0]] == [line["step"] for line in skipped[1]]
    observed = [each for each in marks if each.asked]
    assert any(each.waited for each in observed)  # before a checkpoint, and at the end
    assert any(not each.waited for each in observed)
