"""Experiment trackers: TensorBoard for real, any other through a stand-in of its kind."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.training import train
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.monitoring.trackers import TRACKERS, TrackerKind, check_trackers, open_trackers


class Diary:
    """A tracker that writes down what it is told."""

    def __init__(self, identity: str | None = None, fail_at: int | None = None) -> None:
        self.identity = identity or "given by the server"
        self.fail_at = fail_at
        self.told: list[Any] = []

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if step == self.fail_at:
            raise ConnectionError("server away")
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


def test_tensorboard_gets_what_the_metrics_file_gets(make_run: Callable[..., RunConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(max_steps=3, trackers=["tensorboard"])
    train(run)
    events = EventAccumulator(str(run.output_path / "tensorboard")).Reload()
    lines = read_metrics(run.output_path)
    for name in ("loss", "learning_rate", "tokens_per_second", "learning_rates.projector"):
        found = {event.step: event.value for event in events.Scalars(name)}
        whole = name.partition(".")
        expected = {line["step"]: line[whole[0]][whole[2]] if whole[2] else line[name] for line in lines}
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_package_that_is_missing_is_one_error_before_anything_is_written(make_run: Callable[..., RunConfig]) -> None:
    absent = {"tensorboard": TrackerKind("no_such_package", TRACKERS["tensorboard"].open)}
    with pytest.raises(UserError, match=r"tensorboard needs the package no_such_package.*pip install no_such_package"):
        check_trackers(["tensorboard"], absent)
    run = make_run(trackers=["swanlab"])
    with pytest.raises(UserError, match="pip install swanlab"):
        train(run)
    assert not run.output_path.exists()


def test_numbers_reach_a_tracker_and_nothing_else(tmp_path: Path) -> None:
    diary = Diary()
    kinds = {"diary": TrackerKind("json", lambda folder, identity: diary)}
    configuration = {"optimizer": {"learning_rate": 0.1, "betas": [0.9, 0.99]}, "seed": 3}
    trackers = open_trackers(["diary"], tmp_path, configuration, Console(), kinds)
    trackers.log({"step": 4, "loss": 2.5, "mfu": None, "learning_rates": {"projector": 0.1}}, step=4)
    trackers.finish()
    assert diary.told == [
        "start",
        {"optimizer.learning_rate": 0.1, "optimizer.betas": "[0.9, 0.99]", "seed": 3},
        (4, {"loss": 2.5, "learning_rates.projector": 0.1}),
        "finish",
    ]


@pytest.mark.parametrize("named_by_server", [False, True])
def test_a_continued_run_goes_on_in_the_same_place(tmp_path: Path, named_by_server: bool) -> None:
    diaries = []

    def open_diary(folder: Path, identity: str | None) -> Diary:
        diaries.append(Diary(identity))
        return diaries[-1]

    named = (lambda diary: diary.identity) if named_by_server else None
    kinds = {"diary": TrackerKind("json", open_diary, named)}
    for _ in range(2):
        open_trackers(["diary"], tmp_path, {"seed": 3}, Console(), kinds)
    first, second = diaries
    assert first.identity == second.identity
    assert (first.identity == "given by the server") == named_by_server
    assert (first.told, second.told) == (["start", {"seed": 3}], ["start"])


def test_a_tracker_that_fails_is_reported_and_left_out(tmp_path: Path) -> None:
    failing, fine = Diary(fail_at=2), Diary()
    kinds = {
        "failing": TrackerKind("json", lambda folder, identity: failing),
        "fine": TrackerKind("json", lambda folder, identity: fine),
    }
    said = io.StringIO()
    trackers = open_trackers(["failing", "fine"], tmp_path, {}, Console(file=said, width=200), kinds)
    for step in (1, 2, 3):
        trackers.log({"loss": float(step)}, step)
    trackers.finish()
    assert "tracker failing failed and is left out from here on: server away" in said.getvalue()
    assert failing.told == ["start", {}, (1, {"loss": 1.0})]
    assert fine.told == ["start", {}, *((step, {"loss": float(step)}) for step in (1, 2, 3)), "finish"]
