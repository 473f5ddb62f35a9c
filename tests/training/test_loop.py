"""Whole runs at tiny size: they learn, repeat to the bit, go on where they stopped, and divide over batches freely."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_npu import UserError
from llava_npu.config import RunConfig, render_config
from llava_npu.data.plan import Plan
from llava_npu.models import load
from llava_npu.training import train
from llava_npu.training.checkpointing.checkpoints import checkpoints
from llava_npu.training.monitoring.metrics import read_metrics
from support import tiny
from support.crashed_run import crash_after

MakeRun = Callable[..., RunConfig]


def _losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run.output_path)]


def _weights(run: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(run.output_path / "model/model.safetensors")


@pytest.mark.slow
def test_align_then_finetune_learns(make_run: MakeRun) -> None:
    align = make_run("align", stage="align", max_steps=20, epochs=10, optimizer={"learning_rate": 1e-2})
    model = train(align)
    assert _losses(align)[-1] < _losses(align)[0] - 0.3

    finetune = make_run(
        "finetune",
        max_steps=20,
        epochs=10,
        model={"checkpoint": str(model), "vision_tower": None, "language_model": None},
    )
    train(finetune)
    assert _losses(finetune)[-1] < _losses(finetune)[0] - 1.0
    load(finetune.output_path)  # a run folder is as good as its model folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "learning"),
    [("align", {"multi_modal_projector"}), ("finetune", {"multi_modal_projector", "language_model"})],
)
def test_only_what_the_stage_names_is_trained(make_run: MakeRun, stage: str, learning: set[str]) -> None:
    run = make_run(stage=stage, max_steps=3)
    from llava_npu.training.checkpointing.export import build_model

    before = build_model(run)[0].state_dict()
    train(run)
    after = load(run.output_path)[0].state_dict()
    changed = {
        name.split(".")[1] if name.startswith("model.") else name
        for name in after
        if not torch.equal(after[name], before[name])
    }
    assert changed - {"lm_head.weight"} == learning


@pytest.mark.slow
def test_sixteen_bit_computing_learns_and_leaves_frozen_weights_unrounded(make_run: MakeRun) -> None:
    run = make_run(stage="align", precision="bf16", max_steps=6, optimizer={"learning_rate": 1e-2})
    train(run)
    assert _losses(run)[-1] < _losses(run)[0]
    before = load_file(Path(run.model.language_model or "") / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(_weights(run)["language_model.model.layers.0.mlp.up_proj.weight"], before)


@pytest.mark.slow
@pytest.mark.parametrize("cache_features", [False, True])
def test_sixteen_bit_computing_with_batch_normalisation(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_features: bool
) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    tower = {"vision_tower": str(tiny.write_resnet(tmp_path / "resnet")), "vision_feature_layer": -1}
    data = {"cache_features": cache_features}
    run = make_run(
        stage="align", precision="bf16", max_steps=6, optimizer={"learning_rate": 1e-2}, model=tower, data=data
    )
    train(run)
    assert _losses(run)[-1] < _losses(run)[0]


@pytest.mark.slow
def test_the_same_run_twice_is_equal_to_the_last_bit(make_run: MakeRun) -> None:
    first, second = make_run("first"), make_run("second")
    train(first)
    train(second)
    assert _losses(first) == _losses(second)
    assert all(torch.equal(tensor, _weights(second)[name]) for name, tensor in _weights(first).items())


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_accumulation_and_workers_change_nothing(make_run: MakeRun) -> None:
    whole = make_run("whole")
    parts = make_run("parts", micro_batch_size=2, data={"workers": 1})
    train(whole)
    train(parts)
    assert _losses(parts) == pytest.approx(_losses(whole), abs=1e-5)
    for name, tensor in _weights(whole).items():
        torch.testing.assert_close(_weights(parts)[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(make_run: MakeRun) -> None:
    plain, recomputing = make_run("plain"), make_run("recomputing", gradient_checkpointing=True)
    train(plain)
    train(recomputing)
    assert _losses(recomputing) == pytest.approx(_losses(plain), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_cached_features_change_no_number(
    make_run: MakeRun, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    plain, cached = make_run("plain", stage=stage), make_run("cached", stage=stage, data={"cache_features": True})
    train(plain)
    train(cached)
    assert _losses(cached) == pytest.approx(_losses(plain), abs=1e-6)
    files = sorted((tmp_path / "cache/features").rglob("*.safetensors"))
    assert len(files) == 24
    for damaged, size in zip(files, (0, 30, -1), strict=False):
        damaged.write_bytes(damaged.read_bytes()[:size])
    again = make_run("again", stage=stage, data={"cache_features": True})
    train(again)
    assert _losses(again) == _losses(cached)


def test_text_alone_trains_too(make_run: MakeRun, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a square"}]
    (tmp_path / "text.json").write_text(
        json.dumps([{"id": str(number), "conversations": turns} for number in range(8)])
    )
    run = make_run(data={"path": str(tmp_path / "text.json")}, max_steps=4)
    train(run)
    assert _losses(run)[-1] < _losses(run)[0]


def test_the_loss_is_that_of_transformers_on_the_same_batch(make_run: MakeRun) -> None:
    from llava_npu.data.dataset import ConversationDataset, collate
    from llava_npu.data.plan import Plan
    from llava_npu.data.records import load_records
    from llava_npu.training.checkpointing.export import build_model

    run = make_run(max_steps=1)
    model, processor = build_model(run)
    dataset = ConversationDataset(load_records(run.data.path), processor)
    indices = Plan(len(dataset), 8, run.epochs, run.seed).step(0)
    batch = collate([dataset[int(index)] for index in indices], processor.tokenizer.pad_token_id)
    expected = model.eval()(**batch).loss.item()
    train(run)
    assert _losses(run)[0] == pytest.approx(expected, abs=1e-5)


def test_little_data_is_remarked_on(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_run(batch_size=32, max_steps=1, epochs=1))
    said = capsys.readouterr().err
    assert "1 step of 32 samples" in said
    assert "batch_size is 32, the data 26 samples: a step sees each more than once" in said
    assert "the only step is warmup, with a learning rate of 0: nothing is learned" in said


# ---- interruption ----


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(make_run: MakeRun, tmp_path: Path) -> None:
    whole = make_run("whole", save_every=2, max_steps=8)
    train(whole)
    cut = make_run("cut", save_every=2, max_steps=8)
    (tmp_path / "cut.yaml").write_text(render_config(cut))
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_npu", "train", str(tmp_path / "cut.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not list(cut.output_path.glob("checkpoint-*")):
        assert process.poll() is None or (cut.output_path / "model").is_dir()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(cut)
    assert _losses(cut) == _losses(whole)
    assert all(torch.equal(tensor, _weights(cut)[name]) for name, tensor in _weights(whole).items())
    assert not list(cut.output_path.glob(".*partial")), "leftovers of the interruption"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_run("whole", save_every=2)
    train(whole)
    run = make_run("run", save_every=2)
    crash_after(run, 5)
    (run.output_path / "checkpoint-000004/state/__0_0.distcp").write_bytes(b"damaged")
    (run.output_path / ".checkpoint-000006.partial").mkdir()
    train(run)
    assert "checkpoint-000004: state/__0_0.distcp is damaged" in capsys.readouterr().err.replace("\n", "")
    assert _losses(run) == _losses(whole)


@pytest.mark.slow
def test_a_finished_run_is_left_alone(make_run: MakeRun) -> None:
    run = make_run(max_steps=2)
    train(run)
    before = (run.output_path / "metrics.jsonl").read_bytes()
    assert train(run) == run.output_path / "model"
    assert (run.output_path / "metrics.jsonl").read_bytes() == before
    train(run, fresh=True)
    assert len(_losses(run)) == 2


# ---- what may be wrong ----


def test_a_folder_with_other_things_is_not_touched(make_run: MakeRun) -> None:
    run = make_run()
    run.output_path.mkdir()
    (run.output_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis\.tex\)"):
        train(run)
    with pytest.raises(UserError, match="is not empty"):
        train(run, fresh=True)
    assert [path.name for path in run.output_path.iterdir()] == ["thesis.tex"]


def test_another_configuration_in_the_same_folder_is_refused(make_run: MakeRun) -> None:
    train(make_run(max_steps=1))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.002 → 0\.5"):
        train(make_run(max_steps=1, optimizer={"learning_rate": 0.5}))
    train(make_run(max_steps=1, log_every=3))  # changes nothing that is computed


def test_a_run_that_would_train_nothing(make_run: MakeRun, material: Path, tmp_path: Path) -> None:
    tiny.write_language_model(tmp_path / "lm", hidden_size=32)
    model = {"language_model": str(tmp_path / "lm"), "projector": "identity"}
    with pytest.raises(UserError, match="nothing would be trained"):
        train(make_run(stage="align", model=model))


@pytest.mark.slow
def test_a_mistake_in_a_run_that_never_began_can_be_mended_in_place(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="Did you mean 'resampler'"):
        train(make_run(max_steps=1, model={"projector": "resampller", "projector_options": {"num_queries": 4}}))
    assert train(
        make_run(max_steps=1, model={"projector": "resampler", "projector_options": {"num_queries": 4}})
    ).is_dir()


@pytest.mark.slow
def test_other_data_or_another_base_in_the_same_folder_is_refused(
    make_run: MakeRun, material: Path, tmp_path: Path
) -> None:
    shutil.copytree(material, tmp_path / "own")
    run = make_run(
        max_steps=1, data={"path": str(tmp_path / "own/train.json")}, model={"language_model": str(tmp_path / "own/lm")}
    )
    train(run)
    train(run.model_copy(update={"micro_batch_size": 2, "gradient_checkpointing": True, "log_every": 3}))
    weights = tmp_path / "own/lm/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match=r"model_fingerprints\.language_model: 'sha256:"):
        train(run)
    weights.write_bytes(before)
    shutil.rmtree(tmp_path / "own/lm")
    train(run)  # it is finished: its base may be gone
    shutil.copytree(material / "lm", tmp_path / "own/lm")
    records = json.loads((tmp_path / "own/train.json").read_text())
    (tmp_path / "own/train.json").write_text(json.dumps(records[:-1]))
    with pytest.raises(UserError, match="data_fingerprint"):
        train(run)


def test_too_little_disk_space_is_said_before_training(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.0 GiB free; this run needs"):
        train(make_run())


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_nothing_half_written(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_npu.training.checkpointing import state

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    run = make_run(save_every=2)
    monkeypatch.setattr(state, "write_tensors", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        train(run)
    assert not list(run.output_path.glob("*checkpoint*"))
    monkeypatch.undo()
    train(run)  # with space again, the same command finishes


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(make_run: MakeRun) -> None:
    optimizer = {"weight_decay": 1e308, "warmup_ratio": 0.0}
    with pytest.raises(UserError, match="3 steps had a gradient that is not finite, more than max_nonfinite_steps"):
        train(make_run(optimizer=optimizer, max_nonfinite_steps=2))


def test_an_unreadable_image_names_record_and_file(make_run: MakeRun, material: Path, tmp_path: Path) -> None:
    shutil.copytree(material, tmp_path / "own")
    (tmp_path / "own/images/3.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"record 3.*3\.png"):
        train(make_run(data={"path": str(tmp_path / "own/train.json")}))


@pytest.mark.slow
def test_an_image_that_goes_bad_loses_no_step(make_run: MakeRun, material: Path, tmp_path: Path) -> None:
    shutil.copytree(material, tmp_path / "own")
    data = {"path": str(tmp_path / "own/train.json")}
    whole, run = make_run("whole", data=data), make_run("run", data=data)
    train(whole)
    image = tmp_path / f"own/images/{next(index for index in Plan(26, 8, 4).step(2) if 2 <= index < 24)}.png"
    sound = image.read_bytes()
    image.write_bytes(b"not an image")
    with pytest.raises(UserError, match=rf"{image.name}.*\n?.*All is saved after step 2: once this is fixed"):
        train(run)
    assert [each.step for each in checkpoints(run.output_path)] == [2]
    image.write_bytes(sound)
    train(run)
    assert _losses(run) == _losses(whole)


def test_a_batch_that_does_not_divide_names_what_does(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"batch size 8 is not a multiple of .* micro batch 3; use 6 or 9"):
        train(make_run(micro_batch_size=3))
