"""Several processes answer what one would have answered, and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from llava_npu.cli import app
from llava_npu.errors import UserError
from llava_npu.evaluation.predictions import Prediction, append_predictions, read_predictions
from llava_npu.evaluation.processes import ALONE, Processes, check_devices, joined
from llava_npu.evaluation.questions import Answer, Question
from llava_npu.evaluation.run import evaluate
from llava_npu.evaluation.run_folder import collect_predictions, predictions_path
from support.evaluation_samples import FakeAnswerer, always_a, circular_rows, write_tsv

COMMAND = [sys.executable, "-m", "llava_npu"]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "bench.tsv", circular_rows(groups=5))


def predicted(name: str, answer: str = "A") -> Prediction:
    return Prediction(name, "?", answer, {"strict": answer}, "A", 0.1)


def test_every_item_goes_to_one_process() -> None:
    items = list(range(11))
    shares = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ALONE.share(items) == items


def test_one_process_alone_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes == ALONE
        processes.wait()
        assert processes.from_first("mine") == "mine"
    assert not torch.distributed.is_initialized()


def test_parts_become_one_file(tmp_path: Path) -> None:
    append_predictions(tmp_path / "predictions.jsonl", [predicted("0")])
    for rank in range(2):
        path = predictions_path(tmp_path, Processes(rank, 2))
        append_predictions(path, [predicted(f"{rank + 1}"), predicted(f"{rank + 3}")])
    with path.open("ab") as file:
        file.write(b'{"torn')
    predictions, notes = collect_predictions(tmp_path, map(str, range(9)))
    assert sorted(prediction.id for prediction in predictions) == ["0", "1", "2", "3", "4"]
    assert "torn last line (6 bytes)" in notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert read_predictions(tmp_path / "predictions.jsonl")[0] == predictions
    assert collect_predictions(tmp_path, map(str, range(9))) == (predictions, [])


def test_collecting_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    part = tmp_path / "predictions-1.jsonl"
    append_predictions(tmp_path / "predictions.jsonl", [predicted("0")])  # was copied, and not yet deleted
    append_predictions(part, [predicted("0"), predicted("1")])
    predictions, _ = collect_predictions(tmp_path, ["0", "1"])
    assert [prediction.id for prediction in predictions] == ["0", "1"]
    append_predictions(part, [predicted("0", "B")])
    with pytest.raises(UserError, match=r"predictions-1.jsonl: question 0 was answered 'B' here and 'A' elsewhere"):
        collect_predictions(tmp_path, ["0", "1"])


def test_what_processes_left_is_gone_on_with_by_one(bench: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    evaluate("mmbench", bench, FakeAnswerer(always_a), output)
    lines = (output / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (output / "predictions.jsonl").unlink()
    (output / "predictions-0.jsonl").write_bytes(b"".join(lines[:3]))
    (output / "predictions-2.jsonl").write_bytes(b"".join(lines[9:12]))
    rest = FakeAnswerer(always_a)
    report = evaluate("mmbench", bench, rest, output)
    assert len(rest.asked) == len(lines) - 6
    assert report.overall("every rotation").value == 0.25
    assert not list(output.glob("predictions-*"))


def test_two_runs_cannot_share_a_folder(bench: Path, tmp_path: Path) -> None:
    class Intruder(FakeAnswerer):
        def answer(self, questions: Sequence[Question]) -> list[Answer]:
            with pytest.raises(UserError, match="out is in use by another run"):
                evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")
            return super().answer(questions)

    evaluate("mmbench", bench, Intruder(always_a), tmp_path / "out")
    evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "out")  # free again


def test_launch_refuses_what_cannot_be() -> None:
    with pytest.raises(UserError, match=r"--device cpu:0 with --devices 2: .* leave out ':0'"):
        check_devices(2, "cpu:0")
    with pytest.raises(UserError, match="device 'gpu': allowed are"):
        check_devices(2, "gpu")


@pytest.mark.slow
def test_two_devices_answer_as_one(tiny: tuple[Any, Any], bench: Path, tmp_path: Path, device: torch.device) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path / "model")

    def arguments(output: str) -> list[str]:
        paths = {"--model": tmp_path / "model", "--data": bench, "--output": tmp_path / output}
        given = [text for name, path in paths.items() for text in (name, str(path))]
        return ["eval", "mmbench", *given, "--device", device.type, "--max-new-tokens", "4", "--batch-size", "4"]

    def answers(output: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / output / "predictions.jsonl").read_text().splitlines()]
        return sorted(({**line, "seconds": 0} for line in lines), key=lambda line: str(line["id"]))

    result = run(*arguments("both"), "--devices", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Predictions and report") == 1  # one of them speaks
    assert not list((tmp_path / "both").glob("predictions-*"))
    stored = json.loads((tmp_path / "both" / "report.json").read_text(encoding="utf-8"))
    assert stored["provenance"]["sessions"][0]["processes"] == 2
    alone = CliRunner().invoke(app, arguments("alone"))
    assert alone.exit_code == 0, alone.output
    assert answers("both") == answers("alone")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_that_fails_ends_the_others(bench: Path, tmp_path: Path) -> None:
    required = ["--model", str(tmp_path / "absent"), "--data", str(bench), "--output", str(tmp_path / "out")]
    result = run("eval", "mmbench", *required, "--device", "cpu", "--devices", "2")
    assert result.returncode == 2
    assert "absent does not exist" in result.stderr
    assert result.stderr.count("does not exist") == 1  # of both, one error
    assert "What was answered is kept" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_processes_end_with_a_killed_command(bench: Path, tmp_path: Path) -> None:
    required = ["--model", str(tmp_path / "absent"), "--data", str(bench), "--output", str(tmp_path / "out")]
    command = subprocess.Popen([*COMMAND, "eval", "mmbench", *required, "--device", "cpu", "--devices", "2"])
    children: list[psutil.Process] = []
    try:
        while len(children) < 2:
            assert command.poll() is None
            children = [each for each in psutil.Process(command.pid).children() if "RANK" in each.environ()]
        for child in children:
            child.suspend()  # it cannot end by itself, for want of a model
        command.kill()
        assert not psutil.wait_procs(children, timeout=60)[1]
    finally:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        command.kill()
        command.wait()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
