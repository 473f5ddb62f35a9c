"""Killed at any point, a run goes on to the same numbers, bit for bit; asked to stop, it saves and says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import killed_runs
import psutil
import pytest
import torch
from safetensors.torch import load_file

from llava_npu.config import RunConfig, render_config
from llava_npu.training import launching, train
from llava_npu.training.checkpoints import checkpoints, verify
from llava_npu.training.interruption import EXIT_STATUS
from llava_npu.training.launching import launch
from llava_npu.training.metrics import read_metrics

MakeRun = Callable[..., RunConfig]
# Dropout: without the random state of host and device where it was, no number would be the same.
RANDOM = {
    "parts": {"language_model": {"train": "lora"}},
    "lora": {"rank": 4, "dropout": 0.2},
    "save_every": 1,
    "max_steps": 6,
}


def _losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run.output_path)]


def _assert_same(run: RunConfig, whole: RunConfig) -> None:
    assert _losses(run) == _losses(whole)
    weights, expected = (load_file(next((each.output_path / "model").glob("*.safetensors"))) for each in (run, whole))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert not list(run.output_path.glob("*checkpoint*")), "leftovers of interruptions"


def _kill(run: RunConfig, tmp_path: Path, processes: int, points: list[str]) -> list[str]:
    config = tmp_path / f"{run.output_path.name}.json"
    config.write_text(run.model_dump_json())
    result = subprocess.run(
        [sys.executable, killed_runs.__file__, str(config), str(processes), *points],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_killed_at_every_point(make_run: MakeRun, tmp_path: Path) -> None:
    whole, run = make_run("whole", **RANDOM), make_run("run", keep_checkpoints=1, async_checkpoints=True, **RANDOM)
    train(whole)
    points = ["backward", "weights", "manifest", "renamed", "pruning", "full", "exporting"]
    said = _kill(run, tmp_path, 1, points)
    assert [line for line in said if not line.startswith("error")] == [
        f"{point} {2 if point == 'full' else -signal.SIGKILL}" for point in points
    ]
    assert [line for line in said if line.startswith("error")] == [
        f"error: {run.output_path}/checkpoint-{_step_of(said):06d}: no space left on the disk, or none for this user"
    ]
    train(run)
    _assert_same(run, whole)


def _step_of(said: list[str]) -> int:
    line = next(line for line in said if line.startswith("error"))
    return int(line.partition("checkpoint-")[2][:6])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_killed(make_run: MakeRun, tmp_path: Path, engine: str) -> None:
    changes = {**RANDOM, "engine": engine, "micro_batch_size": 4, "max_steps": 4}
    whole, run = make_run("whole", **changes), make_run("run", **changes)
    assert _kill(whole, tmp_path, 2, ["none"]) == ["none 0 0"]
    for line in _kill(run, tmp_path, 2, ["backward@1", "renamed"]):
        assert str(-signal.SIGKILL) in line
    newest = checkpoints(run.output_path)[0]
    weights = next(newest.path.glob("trained-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert verify(newest.path) is not None
    assert _kill(run, tmp_path, 2, ["none"]) == ["none 0 0"]
    _assert_same(run, whole)


def test_an_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    outcome = launch(["train", str(tmp_path / "absent.yaml")], 2)
    assert outcome.status == 2
    assert outcome.message == f"error: {tmp_path / 'absent.yaml'}: there is no such configuration file."


def test_what_ended_a_launch_is_told_from_what_followed(tmp_path: Path) -> None:
    def report(rank: int, status: int, message: str, when: float) -> None:
        text = json.dumps({"status": status, "message": message, "time": when})
        (tmp_path / f"report-{rank}.json").write_text(text)

    for rank in range(3):
        (tmp_path / f"output-{rank}").write_text("")
    assert launching._outcome([0, 0, 0], tmp_path) == launching.Outcome(0, "")
    report(1, 1, "connection closed", 5.0)
    report(2, 1, "connection closed, too", 6.0)
    killed = launching._outcome([-signal.SIGKILL, 1, 1], tmp_path)
    assert killed.status == 128 + signal.SIGKILL
    assert killed.message == "process 0 ended by SIGKILL (the system does this when memory runs out)"
    assert launching._outcome([None, 1, 1], tmp_path) == launching.Outcome(1, "connection closed")
    report(2, 2, "error: no such file", 6.0)
    assert launching._outcome([None, 1, 2], tmp_path) == launching.Outcome(2, "error: no such file")


def test_a_launcher_within_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_npu import UserError

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Leave --devices out"):
        launch(["--version"], 2)


@pytest.mark.slow
def test_processes_end_with_their_launcher_and_when_asked(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(micro_batch_size=4, max_steps=60, epochs=100, save_every=10)
    if run.device != "cpu":
        pytest.skip("nothing here depends on the device")
    whole = make_run("whole", micro_batch_size=4, max_steps=60, epochs=100)
    train(whole)
    (tmp_path / "run.yaml").write_text(render_config(run))
    command = [sys.executable, "-m", "llava_npu", "train", str(tmp_path / "run.yaml"), "--devices", "2"]

    first = _start(command)
    _wait_until(lambda: len(read_metrics(run.output_path)) > 12)
    children = psutil.Process(first.pid).children()
    assert len(children) == 2
    first.kill()
    first.wait()
    _wait_until(lambda: not any(map(_lives, children)))

    second = _start(command)
    _wait_until(lambda: len(read_metrics(run.output_path)) > 22)
    second.send_signal(signal.SIGINT)
    said = second.communicate(timeout=900)[1]
    assert second.returncode == EXIT_STATUS, said
    assert "all saved; the same command continues" in " ".join(said.split())
    assert "Traceback" not in said

    third = _start(command)
    said = third.communicate(timeout=900)[1]
    assert third.returncode == 0, said
    assert "continuing after step" in said
    assert _losses(run) == pytest.approx(_losses(whole), abs=1e-4)


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # ended between the two questions
        return False


def _wait_until(condition: Callable[[], bool], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
