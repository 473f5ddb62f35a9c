"""Steps that are not finite: skipped and named, and not too many of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.records import load_records
from llava_npu.devices import select
from llava_npu.training import train
from llava_npu.training.batches import MicroBatch, micro_batch
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.jsonl import read_lines
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.nonfinite.guard import load_batch, save_batch
from llava_npu.training.nonfinite.replay import _Bare, replay
from llava_npu.training.nonfinite.search import LOSS, NonFinite, find_nonfinite
from llava_npu.training.parts import prepare_parts
from support.poisoned_run import poisoned_run, without_check

MakeRun = Callable[..., RunConfig]


@pytest.fixture
def poisoned(material: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    changes = {"stage": "finetune", "optimizer": {"learning_rate": 1e-2}, "epochs": 1, "max_steps": None}
    with without_check():
        yield changes | poisoned_run(material, tmp_path)


def _train(run: RunConfig) -> str:
    console = Console(file=io.StringIO(), width=500)
    train(run, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_bad_step_is_skipped_and_named(make_run: MakeRun, poisoned: dict[str, Any], log_every: int) -> None:
    run = make_run(**poisoned, log_every=log_every, micro_batch_size=2)
    said = _train(run)
    (line,) = read_lines(run.output_path / "nonfinite_steps.jsonl")
    assert line["module"] == "model.language_model.embed_tokens"
    assert line["what"] == "weights"
    (sample,) = line["samples"]
    assert "record 3 " in sample
    assert f"step {line['step']}: skipped, its gradient is not finite: first the weights of model.language" in said
    metrics = read_metrics(run.output_path)
    assert metrics[-1]["skipped_steps"] == 1
    if log_every == 1:
        assert [each["grad_norm"] is None for each in metrics] == [each["step"] == line["step"] for each in metrics]
        assert "NaN" not in (run.output_path / "metrics.jsonl").read_text()
    projector = {
        name: tensor
        for name, tensor in load_file(run.output_path / "model/model.safetensors").items()
        if "projector" in name
    }
    assert all(tensor.isfinite().all() for tensor in projector.values())


def test_no_model_is_written_of_weights_that_the_last_step_made_infinite(make_run: MakeRun) -> None:
    run = make_run(optimizer={"weight_decay": 1e308, "warmup_ratio": 0.0}, max_steps=1)
    with pytest.raises(UserError, match=r"training diverged: model\.multi_modal_projector\S+ holds NaN or infinite"):
        _train(run)
    assert not (run.output_path / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_a_bad_step_leaves_finite_weights(
    make_run: MakeRun, poisoned: dict[str, Any], precision: str
) -> None:
    run = make_run(**poisoned, precision=precision, log_every=1)
    _train(run)
    assert len(read_lines(run.output_path / "nonfinite_steps.jsonl")) == 1
    assert sum(each["grad_norm"] is None for each in read_metrics(run.output_path)) == 1
    weights = load_file(run.output_path / "model/model.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in weights.items() if "projector" in name)


@pytest.mark.slow
def test_a_skipped_step_changes_nothing(make_run: MakeRun, poisoned: dict[str, Any], tmp_path: Path) -> None:
    """Reference: the same run in which that step is left out."""
    from llava_npu.training import trainer as loop

    run = make_run("run", **poisoned)
    _train(run)
    (line,) = read_lines(run.output_path / "nonfinite_steps.jsonl")
    accumulate = loop._accumulate
    calls = []

    def without_it(engine: Any, *arguments: Any) -> torch.Tensor:
        calls.append(None)
        loss = accumulate(engine, *arguments)
        if len(calls) == line["step"]:
            step = engine.step

            def no_step(max_grad_norm: float) -> torch.Tensor:
                engine.optimizer.zero_grad(set_to_none=True)
                engine.step = step
                return torch.zeros(())

            engine.step = no_step
        return loss

    other = make_run("other", **poisoned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_accumulate", without_it)
        _train(other)
    weights = [load_file(each.output_path / "model/model.safetensors") for each in (run, other)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items() if "projector" in name)


@pytest.mark.slow
def test_too_many_stop_the_run_and_can_be_replayed(
    make_run: MakeRun, poisoned: dict[str, Any], device: torch.device
) -> None:
    run = make_run(**poisoned, max_nonfinite_steps=0, log_every=1)
    with pytest.raises(UserError, match="1 steps had a gradient that is not finite, more than max_nonfinite_steps"):
        train(run)
    (line,) = read_lines(run.output_path / "nonfinite_steps.jsonl")
    assert (run.output_path / f"checkpoint-{line['step']:06d}").is_dir()
    said: list[str] = []
    assert not replay(run.output_path, select(device.type), None, said.append)
    assert "first the weights of model.language_model.embed_tokens, in " in said[-1]
    assert "record 3 " in said[-1]
    train(run)  # the same command goes on behind that step
    assert [each["step"] for each in read_metrics(run.output_path)] == [1, 2, 3, 4]  # the one that stopped it too
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        replay(run.output_path, select(device.type), None, said.append)


def test_nothing_to_replay(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no batch to replay"):
        replay(tmp_path, select("cpu"), None, print)


# ---- where numbers stop being finite ----


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


@pytest.fixture
def setting(make_run: MakeRun, device: torch.device) -> tuple[Any, MicroBatch, torch.device]:
    run = make_run()
    model, processor = build_model(run)
    prepare_parts(model, run.resolved_parts, None, checkpointing=False)
    dataset = ConversationDataset(load_records(run.data.path), processor)
    batch = micro_batch(
        [dataset[index] for index in (0, 1, 2)], None, processor.tokenizer.pad_token_id, processor.image_token_id
    )
    return model.to(device), batch, device


def _find(setting: tuple[Any, MicroBatch, torch.device]) -> NonFinite | None:
    model, batch, device = setting
    return find_nonfinite(_Bare(SupervisedLoss(model), None), model, [batch], batch.supervised_tokens, device)


def test_nothing_is_found_where_all_is_well(setting: tuple[Any, MicroBatch, torch.device]) -> None:
    assert _find(setting) is None


@pytest.mark.parametrize(
    ("module", "change", "what"),
    [
        ("model.language_model.layers.1.mlp", lambda output: output / 0, "output"),
        ("model.vision_tower", None, "output"),
        ("model.language_model.layers.0.mlp", _BadGradient.apply, "gradient"),
    ],
)
def test_the_first_module_is_named(
    setting: tuple[Any, MicroBatch, torch.device], module: str, change: Any, what: str
) -> None:
    model, batch, _ = setting
    if module == "model.vision_tower":  # an image that is no number
        batch.tensors["pixel_values"][1] = float("nan")
    else:
        model.get_submodule(module).register_forward_hook(lambda _, __, output: change(output))
    found = _find(setting)
    assert found is not None
    assert found.module.startswith(module if what == "output" else "model.language_model.layers.0")
    assert found.what == what
    assert set(found.samples) <= set(batch.names)


def test_the_sample_is_named(setting: tuple[Any, MicroBatch, torch.device]) -> None:
    model, batch, _ = setting
    start = batch.sequence_lengths[0] + batch.sequence_lengths[1]

    def spoil(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.view(-1, output.shape[-1])[start + 2] = float("inf")
        return output

    model.get_submodule("model.language_model.layers.0.mlp").register_forward_hook(spoil)
    found = _find(setting)
    assert found is not None
    assert found.samples == (batch.names[1],)


def test_the_loss_is_named(setting: tuple[Any, MicroBatch, torch.device]) -> None:
    model = setting[0]
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    found = _find(setting)
    assert found is not None
    # With tied embeddings the row is the embeddings' too.
    assert found.module in (LOSS, "model.language_model.embed_tokens")


def test_a_saved_batch_is_the_batch(setting: tuple[Any, MicroBatch, torch.device], tmp_path: Path) -> None:
    batch = setting[1]
    save_batch(tmp_path, 7, 0, [batch, replace(batch, tensors={k: t.clone() for k, t in batch.tensors.items()})])
    first, second = load_batch(tmp_path / "nonfinite/step-000007/process-00000.safetensors")
    for each in (first, second):
        assert (each.names, each.sequence_lengths, each.supervised_tokens) == (
            batch.names,
            batch.sequence_lengths,
            batch.supervised_tokens,
        )
        assert each.tensors.keys() == batch.tensors.keys()
        assert all(torch.equal(tensor, batch.tensors[name]) for name, tensor in each.tensors.items())
