"""Which devices trials are spread over, in which order, and what becomes of a worker that dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.comparison import scheduler as schedule
from llava_npu.comparison.folder import read_failure
from llava_npu.comparison.grid import Trial, expand
from llava_npu.config import validate
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.devices.cuda import CudaDevice
from llava_npu.errors import UserError
from support.comparison_samples import values


def grid(material: Path, output: Path) -> list[Trial]:
    encoders = [
        {"name": name, "vision_tower": str(material / "clip"), "image_aspect_ratio": ratio}
        for name, ratio in (("a", "pad"), ("b", "square"))
    ]
    changes = values(material, output, encoders=encoders, projectors=["linear", "mlp2x_gelu"])
    trials = expand(validate(ComparisonConfig, changes, "grid"), "grid")
    for trial in trials:
        trial.folder.mkdir(parents=True)
    return trials


def test_devices_by_name() -> None:
    assert schedule.all_devices(["cpu", "cpu"]) == ["cpu", "cpu"]
    with pytest.raises(UserError, match="allowed are auto"):
        schedule.all_devices(["gpu"])
    with pytest.raises(UserError, match="this machine has 1 of kind cpu"):
        schedule.all_devices(["cpu:3"])


def test_devices_that_train_a_trial_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(CudaDevice, "count", 4)
    four = [f"cuda:{index}" for index in range(4)]
    assert schedule.share_out(four, 1) == [schedule.Slot(name) for name in four]
    assert [slot.environment for slot in schedule.share_out(four, 2)] == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9")  # the user's choice is what is divided
    assert schedule.share_out(four, 3) == [schedule.Slot("cuda", 3, {"CUDA_VISIBLE_DEVICES": "3,5,7"})]
    assert schedule.share_out(["cpu"], 2) == [schedule.Slot("cpu", 2)]
    with pytest.raises(UserError, match="devices_per_trial: 8, but there are 4 devices"):
        schedule.share_out(four, 8)


@pytest.mark.slow
def test_different_encoders_come_first_and_a_dying_worker_takes_no_other_with_it(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"  # kills itself in one trial, and succeeds in the others
    worker.write_text(
        "import os, signal, sys\nprint('at work', flush=True)\n"
        "if 'a-mlp2x' in sys.argv[1]: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setattr(schedule, "WORKER", (str(worker),))
    trials = grid(material, tmp_path / "out")
    events: list[schedule.Event] = []
    schedule.run_trials(trials, [schedule.Slot("cpu"), schedule.Slot("cpu")], events.append)
    started = [event.trial.encoder for event in events if event.kind == "started"]
    assert started == ["a", "b", "a", "b"]
    ended = {event.trial.folder: event.kind for event in events if event.kind in ("finished", "failed")}
    assert sorted(ended.values()) == ["failed", "finished", "finished", "finished"]
    (failed,) = (folder for folder, kind in ended.items() if kind == "failed")
    failure = read_failure(failed)
    assert failure is not None
    assert "ended by signal 9 (out of memory?)" in failure.reason
    assert "at work" in [event.text for event in events if event.kind == "line"]


def test_the_processes_of_a_trial_are_launched_together_and_kept_to_their_devices(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, sys\n"
        "seen = ' '.join(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES'))\n"
        "(pathlib.Path(sys.argv[1]) / f'seen-{os.environ[\"RANK\"]}').write_text(seen)\n"
    )
    monkeypatch.setattr(schedule, "WORKER", (str(worker),))
    (trial, *_) = grid(material, tmp_path / "out")
    events: list[schedule.Event] = []
    schedule.run_trials([trial], [schedule.Slot("cuda", 2, {"CUDA_VISIBLE_DEVICES": "5,7"})], events.append)
    assert [event.kind for event in events if event.kind != "line"] == ["started", "finished"]
    assert [(trial.folder / f"seen-{rank}").read_text() for rank in (0, 1)] == ["0 2 5,7", "1 2 5,7"]
