"""Killed at any point, a run goes on to the same numbers, bit for bit; asked to stop, it saves and says so."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from llava_npu.config import RunConfig, render_config
from llava_npu.distributed import launching
from llava_npu.distributed.interruption import EXIT_STATUS
from llava_npu.distributed.launching import launch
from llava_npu.training import train
from llava_npu.training.checkpointing.checkpoints import checkpoints, verify
from llava_npu.training.monitoring.metrics import read_metrics
from support import killed_runs

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


def _points(scopes: Sequence[str], counts: Mapping[str, int], steps: int, draw: random.Random) -> list[str]:
    """A point in each of `scopes`, within what a step or two take: so that a few of them do not end the run."""
    most = {scope: max(count * 5 // (4 * steps), 1) for scope, count in counts.items()} | {"torn": 16_000}
    most |= {"anywhere": counts["anywhere"] // 2, "export": counts["export"]}  # what is not of every step
    return [f"{scope}:{draw.randint(1, most[scope])}" for scope in scopes]


def _lines(said: list[str], rank: int = 0) -> dict[str, int]:
    """How many lines an undisturbed run has in each scope."""
    (found,) = (line.split()[2:] for line in said if line.startswith(f"  lines {rank}"))
    return {scope: int(count) for scope, count in (each.split("=") for each in found)}


@pytest.fixture
def draw() -> random.Random:
    """Draws where runs are killed. Other points: LLAVA_NPU_KILL_SEED=7 pytest …"""
    seed = int(os.environ.get("LLAVA_NPU_KILL_SEED", "5"))
    print(f"LLAVA_NPU_KILL_SEED={seed}")  # shown where the test fails
    return random.Random(seed)


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_killed_at_any_point(make_run: MakeRun, tmp_path: Path, draw: random.Random, exhaustive: bool) -> None:
    changes = {**RANDOM, "keep_checkpoints": 1, "async_checkpoints": True}
    whole, run = make_run("whole", **changes), make_run("run", **changes)
    counts = _lines(_kill(whole, tmp_path, 1, ["count"]))
    scopes = ["step", "save", "torn", "cleanup", "export"]
    if exhaustive:
        scopes[3:3] = ["anywhere", "save"]
    points = ["full", *_points(scopes, counts, steps=6, draw=draw)]
    said = _kill(run, tmp_path, 1, points)
    ends = dict(line.rsplit(" ", 1) for line in said if line[0].isalpha() and not line.startswith("error"))
    assert set(ends) == set(points)
    assert ends["full"] == "2"
    assert f"error: {run.output_path}/checkpoint-000001: no space left on the disk, or none for this user" in said
    killed = [point for point, end in ends.items() if int(end) in (-signal.SIGKILL, -signal.SIGXFSZ)]
    assert set(ends.values()) - {"2", "0"} <= {str(-signal.SIGKILL), str(-signal.SIGXFSZ)}, said
    assert len(killed) >= len(scopes) // 2, said
    assert _kill(run, tmp_path, 1, ["none"]) == ["none 0"]
    _assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.exhaustive), "fsdp2"])
def test_two_processes_killed(make_run: MakeRun, tmp_path: Path, engine: str, draw: random.Random) -> None:
    changes = {**RANDOM, "engine": engine, "micro_batch_size": 4, "max_steps": 4}
    whole, run = make_run("whole", **changes), make_run("run", **changes)
    counted = _kill(whole, tmp_path, 2, ["count"])
    points = [
        *_points([draw.choice(["save", "cleanup"])], _lines(counted), steps=4, draw=draw),
        *(f"{point}@1" for point in _points(["step"], _lines(counted, rank=1), steps=4, draw=draw)),
    ]
    said = _kill(run, tmp_path, 2, points)
    assert sum(str(-signal.SIGKILL) in line for line in said) == len(points), said
    newest = checkpoints(run.output_path)
    if newest:  # killed before the first one had its name, there is none
        shard = next(newest[0].path.glob("state/__1_*"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        assert verify(newest[0].path) is not None
        if len(newest) == 1:
            refused = _kill(run, tmp_path, 2, ["none"])
            assert sum(f"{shard.relative_to(newest[0].path)} is damaged" in line for line in refused) == 2, refused
            shutil.rmtree(newest[0].path)
    assert _kill(run, tmp_path, 2, ["none"]) == ["none 0 0"]
    _assert_same(run, whole)


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    outcome = launch(["train", str(tmp_path / "absent.yaml")], 2)
    assert outcome.status == 2
    assert outcome.message == f"error: {tmp_path / 'absent.yaml'}: no such configuration file."


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
    assert "everything is saved; the same command resumes" in " ".join(said.split())
    assert "Traceback" not in said

    third = _start(command)
    said = third.communicate(timeout=900)[1]
    assert third.returncode == 0, said
    assert "resuming after step" in said
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
