"""Run folders that were damaged from outside: recovered, or one clear error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.training import train
from llava_npu.training.checkpointing.checkpoints import verify
from llava_npu.training.monitoring.jsonl import rewind_lines
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.run_folder import check_disk_space, is_finished, only_process, open_run, read_run_file
from support.crashed_run import crash_after

MakeRun = Callable[..., RunConfig]


@pytest.fixture
def stopped(make_run: MakeRun) -> RunConfig:
    """A run of 4 steps that crashed after its checkpoint of step 2."""
    run = make_run(max_steps=4, save_every=2)
    crash_after(run, 3)
    return run


@pytest.mark.slow
def test_a_damaged_run_file_is_taken_from_a_checkpoint(stopped: RunConfig) -> None:
    path = stopped.output_path / "run.yaml"
    whole = path.read_bytes()
    fingerprint = read_run_file(stopped.output_path)["data_fingerprint"]
    for damage in (b"", b"\0" * 400, b"{: [", b"[]", b"config: 3\n", whole[: len(whole) // 2], None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        open_run(stopped, fingerprint)
        assert path.read_bytes() == whole, damage
    path.write_bytes(b"")
    train(stopped)
    assert [line["step"] for line in read_metrics(stopped.output_path)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_room_that_checkpoints_take_counts_as_free(stopped: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (stopped.output_path / "checkpoint-000002").rglob("*")
    taken = sum(file.stat().st_size for file in files if file.is_file())
    full = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    check_disk_space(stopped.output_path, taken)
    with pytest.raises(UserError, match="for its checkpoints and the final model"):
        check_disk_space(stopped.output_path, taken + 1)


@pytest.mark.slow
def test_without_a_copy_it_is_one_clear_error(stopped: RunConfig) -> None:
    (stopped.output_path / "run.yaml").write_bytes(b"\0\0")
    shutil.rmtree(stopped.output_path / "checkpoint-000002")
    with pytest.raises(UserError, match=r"run\.yaml is absent or damaged, .* start the run over with --fresh"):
        train(stopped)
    train(stopped, fresh=True)
    assert is_finished(stopped.output_path)


@pytest.mark.slow
def test_a_model_folder_without_weights_is_not_a_finished_run(make_run: MakeRun) -> None:
    run = make_run(max_steps=1)
    train(run)
    (run.output_path / "model/model.safetensors").unlink()
    assert not is_finished(run.output_path)
    train(run)
    assert (run.output_path / "model/model.safetensors").is_file()


@pytest.mark.parametrize("manifest", ["[]", "{}", "3", "", '{"weights.safetensors": 5}'])
def test_a_damaged_manifest_is_a_damaged_checkpoint(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "manifest.json").write_text(manifest)
    assert verify(tmp_path)


@pytest.mark.parametrize("line", ["{}", "[]", "\0\0\0", '{"step": null}'])
def test_a_garbage_line_of_metrics_names_file_and_line(tmp_path: Path, line: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .*Delete that line"):
        rewind_lines(metrics, 3)


def test_what_cannot_be_deleted_is_one_clear_error(make_run: MakeRun) -> None:
    run = make_run()
    (run.output_path / "metrics.jsonl").mkdir(parents=True)  # unlink fails, whoever runs this
    (run.output_path / "run.yaml").write_text("config: {}\ndata_fingerprint: x\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written or deleted: .*another `output`"):
        open_run(run, "x", fresh=True)


def test_a_folder_that_cannot_be_locked_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock is a folder, and has to be a lock file"), only_process(tmp_path):
        pass


def test_a_lock_whose_owner_is_dead_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("999999999\n")  # what a killed process leaves; the system has freed it
    with only_process(tmp_path):
        pass
