"""Checkpoints that two processes wrote, each its part: read by other engines and numbers of processes, and damaged.

Two processes are started once, for all runs of the module.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llava_npu import UserError, load
from llava_npu.cli import app
from llava_npu.config import RunConfig
from llava_npu.data.plan import Plan
from llava_npu.training import train
from llava_npu.training.checkpointing.checkpoints import checkpoints, verify
from llava_npu.training.checkpointing.export import export_checkpoint
from llava_npu.training.checkpointing.state import SavedState, weight_key
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.run_folder import read_run_file
from support.small_run import in_two_processes, small_run

MakeRun = Callable[..., RunConfig]
STEPS: dict[str, Any] = {"max_steps": 4, "micro_batch_size": 4}
SHARD = "state/__1_0.distcp"


def _losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run.output_path)]


def _damage_an_image(material: Path, folder: Path, step: int) -> Path:
    """A copy of the data in which an image of the batch after `step` steps cannot be read."""
    shutil.copytree(material, folder)
    records = json.loads((folder / "train.json").read_text())
    sample = next(records[index] for index in Plan(len(records), 8, 4).step(step) if 2 <= index < 24)
    (folder / sample["image"]).write_bytes(b"not an image")
    return folder / "train.json"


@pytest.fixture(scope="module")
def saved(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `fsdp2` and `ddp`, which two processes left after two steps, `bad`, and `whole`."""
    folder = tmp_path_factory.mktemp("saved")
    data = _damage_an_image(material, folder / "data", step=2)
    runs = {
        "fsdp2": small_run(material, folder / "fsdp2", "cpu", **STEPS, engine="fsdp2", async_checkpoints=True),
        "ddp": small_run(material, folder / "ddp", "cpu", **STEPS),
        "bad": small_run(material, folder / "bad", "cpu", **STEPS, data={"path": str(data)}),
    }
    raised = in_two_processes(folder / "processes", runs, stop_after={"fsdp2": 2, "ddp": 2})
    stopped = "RunStopped: stopped after step 2, everything is saved; the same command resumes."
    assert raised.pop("bad").startswith("UserError: ")
    assert raised == {"fsdp2": stopped, "ddp": stopped}
    train(small_run(material, folder / "whole", "cpu", **STEPS))
    return folder


@pytest.fixture
def resumed(saved: Path, material: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A copy of one of these runs, to go on with."""

    def copy(name: str, engine: str = "ddp") -> RunConfig:
        shutil.copytree(saved / name, tmp_path / "copy")
        return small_run(material, tmp_path / "copy", "cpu", **STEPS, engine=engine)

    return copy


def test_each_process_writes_an_equal_part(saved: Path) -> None:
    for name in ("fsdp2", "ddp"):
        path = saved / name / "checkpoint-000002"
        assert verify(path) is None
        sizes = [file.stat().st_size for file in sorted(path.glob("state/__*.distcp"))]
        assert len(sizes) == 2
        assert max(sizes) < 1.2 * min(sizes), name


@pytest.mark.parametrize(("name", "engine"), [("fsdp2", "ddp"), ("fsdp2", "fsdp2"), ("ddp", "fsdp2")])
def test_one_process_goes_on_from_two(
    saved: Path, material: Path, resumed: Callable[..., RunConfig], name: str, engine: str
) -> None:
    run = resumed(name, engine)
    train(run)
    whole = small_run(material, saved / "whole", "cpu", **STEPS)
    assert _losses(run) == pytest.approx(_losses(whole), abs=1e-5)
    weights, expected = (load(each.output_path).model.state_dict() for each in (run, whole))
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, atol=1e-5, rtol=0, msg=key)


def test_an_image_that_goes_bad_loses_no_step_in_either_process(saved: Path) -> None:
    assert [each.step for each in checkpoints(saved / "bad")] == [2]
    raised = [json.loads((saved / f"processes/raised-{rank}.json").read_text())["bad"] for rank in "01"]
    assert raised[0] == raised[1]
    assert re.search(r"record \d+ .* image .*/images/\d+\.png", raised[0])
    assert "All is saved after step 2: once this is fixed, the same command continues." in raised[0]


def test_a_missing_shard_is_named(resumed: Callable[..., RunConfig]) -> None:
    run = resumed("fsdp2")
    (run.output_path / "checkpoint-000002" / SHARD).unlink()
    with pytest.raises(UserError, match=rf"000002: {SHARD} is missing\. No other checkpoint in .* is complete"):
        train(run)


def test_a_shard_of_another_run_is_named(saved: Path, resumed: Callable[..., RunConfig]) -> None:
    run = resumed("fsdp2")
    shutil.copyfile(saved / "ddp/checkpoint-000002" / SHARD, run.output_path / "checkpoint-000002" / SHARD)
    with pytest.raises(UserError, match=f"{SHARD} is damaged, or of another run"):
        train(run)


def test_a_checkpoint_of_another_run_is_refused(saved: Path, resumed: Callable[..., RunConfig]) -> None:
    run = resumed("fsdp2")
    shutil.copytree(saved / "ddp/checkpoint-000002", run.output_path / "checkpoint-000003")
    other = read_run_file(saved / "ddp")["run"]
    with pytest.raises(UserError, match=rf"checkpoint-000003 belongs to another run \({other}; this is "):
        train(run)


def test_a_checkpoint_of_an_earlier_version_is_refused(resumed: Callable[..., RunConfig]) -> None:
    run = resumed("fsdp2")
    path = run.output_path / "checkpoint-000002"
    manifest = json.loads((path / "manifest.json").read_text())
    shutil.rmtree(path / "state")
    kept = {name: each for name, each in manifest.items() if not name.startswith("state/")}
    (path / "manifest.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="written by an earlier version of llava-npu"):
        train(run)


def test_other_weights_than_are_trained_are_refused(resumed: Callable[..., RunConfig]) -> None:
    run = resumed("ddp")
    frozen = RunConfig.model_validate({**run.model_dump(), "parts": {"language_model": {"train": "frozen"}}})
    with pytest.raises(UserError, match=r"does not hold what this run trains\. \d+ weights differ in name or shape"):
        train(frozen, accept_changes=True)


def test_commands_show_verify_and_export(saved: Path, tmp_path: Path) -> None:
    run, path = saved / "fsdp2", saved / "fsdp2/checkpoint-000002"
    say = CliRunner()
    shown = say.invoke(app, ["checkpoint", "inspect", str(run / "checkpoints/latest")])
    assert shown.exit_code == 0, shown.output
    assert "after step 2, 16 samples" in shown.output
    assert "written by 2 × fsdp2" in shown.output
    (described,) = json.loads(say.invoke(app, ["checkpoint", "inspect", "--json", str(run)]).output)
    assert described["parameters"] == sum(
        shape.numel() for name, shape in SavedState(path).shapes.items() if name.startswith(weight_key(""))
    )
    assert say.invoke(app, ["checkpoint", "verify", str(run)]).output == f"{path}: complete\n"
    damaged = tmp_path / "checkpoint-000002"
    shutil.copytree(path, damaged)
    (damaged / SHARD).unlink()
    verified = say.invoke(app, ["checkpoint", "verify", str(damaged)])
    assert verified.exit_code == 1
    assert f"{SHARD} is missing" in verified.output
    exported = say.invoke(app, ["checkpoint", "export", str(run), str(tmp_path / "model")])
    assert exported.exit_code == 0, exported.output
    weights, state = load(tmp_path / "model").model.state_dict(), SavedState(path)
    for name in state.shapes:
        if name.startswith(weight_key("")):
            assert torch.equal(weights[name.removeprefix(weight_key(""))], state.whole(name)), name
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(path, tmp_path / "model")


def test_an_exported_model_is_as_transformers_writes_it(saved: Path, tmp_path: Path) -> None:
    """The same files, names and settings as `save_pretrained`, of which nothing is used."""
    model, processor = load(saved / "whole")
    model.save_pretrained(tmp_path / "expected")
    processor.save_pretrained(tmp_path / "expected")
    ours = saved / "whole/model"
    assert {path.name for path in ours.iterdir()} == {path.name for path in (tmp_path / "expected").iterdir()} | {
        "manifest.json"
    }
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((tmp_path / "expected" / name).read_text()), name
