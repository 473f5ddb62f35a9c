"""Float16, for devices without bfloat16: small gradients are kept by scaling the loss, and the scale finds its size."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.records import load_records
from llava_npu.training import train
from llava_npu.training import trainer as loop
from llava_npu.training.batches import micro_batch
from llava_npu.training.checkpointing.checkpoints import checkpoints
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.checkpointing.state import SavedState, scale_key
from llava_npu.training.engines.base import NoOptions
from llava_npu.training.engines.ddp import DdpEngine
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.jsonl import read_lines
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.optimizer import build_optimizer
from llava_npu.training.parts import prepare_parts, trained_parameters
from support.crashed_run import crash_after

MakeRun = Callable[..., RunConfig]


def _column(run: RunConfig, name: str) -> list[Any]:
    return [line[name] for line in read_metrics(run.output_path)]


def _gradients(run: RunConfig, dtype: torch.dtype | None, scaled: bool = True) -> dict[str, torch.Tensor]:
    """Of a step with so many supervised tokens that each one's share is below what float16 can hold."""
    accelerator = Accelerator(cpu=run.device == "cpu")
    model, processor = build_model(run)
    prepare_parts(model, run.resolved_parts, dtype, checkpointing=False)
    engine = DdpEngine(accelerator, dtype, NoOptions(), run.optimizer.max_grad_norm)
    engine.scaler = torch.amp.GradScaler(run.device, enabled=scaled and dtype is not None)
    engine.prepare(SupervisedLoss(model), lambda: build_optimizer(model, run.optimizer, run.resolved_parts))
    dataset = ConversationDataset(load_records(run.data.path), processor)
    batch = micro_batch(
        [dataset[index] for index in range(4)], None, processor.tokenizer.pad_token_id, processor.image_token_id
    )
    loop._accumulate(engine, [batch], supervised_tokens=30_000_000)
    engine.scaler.unscale_(engine.optimizer)
    return {name: p.grad.cpu() for name, p in trained_parameters(model) if p.grad is not None}


def _mean_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    errors = [(gradients[name] - each).norm() / each.norm() for name, each in expected.items() if each.norm() > 0]
    return float(sum(errors) / len(errors))


def test_small_gradients_are_kept(make_run: MakeRun) -> None:
    run = make_run()
    expected = _gradients(run, None)
    assert _mean_error(_gradients(run, torch.float16), expected) < 0.02
    assert _mean_error(_gradients(run, torch.float16, scaled=False), expected) > 0.3  # which is what would be lost


def test_a_run_in_float16_is_that_in_float32_but_for_rounding(make_run: MakeRun) -> None:
    half, full = make_run("half", precision="fp16"), make_run("full")
    train(half)
    train(full)
    assert _column(half, "loss") == pytest.approx(_column(full, "loss"), abs=0.01)
    assert _column(half, "grad_norm") == pytest.approx(_column(full, "grad_norm"), rel=0.02)


def test_the_scale_comes_down_and_goes_on(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps that it spoils are left out, and are nobody's fault; a continued run has the scale that it had."""
    opened = loop.open_engine
    engines = []

    def with_a_huge_scale(*arguments: Any) -> Any:
        engine = opened(*arguments)
        engine.scaler = torch.amp.GradScaler(engine.accelerator.device.type, init_scale=2.0**28)
        engines.append(engine)
        return engine

    monkeypatch.setattr(loop, "open_engine", with_a_huge_scale)
    whole, cut = (make_run(name, precision="fp16", max_steps=12, save_every=6) for name in ("whole", "cut"))
    console = Console(file=io.StringIO(), width=200)
    train(whole, console=console)
    spoilt = [norm is None for norm in _column(whole, "grad_norm")]
    assert spoilt[0]
    assert not spoilt[-1]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("its scaled gradient left float16's range; the scale was halved") == sum(spoilt)
    assert _column(whole, "skipped_steps")[-1] == 0
    assert not read_lines(whole.output_path / "nonfinite_steps.jsonl")
    assert float(engines[0].scaler.get_scale()) == 2.0 ** (28 - sum(spoilt))
    assert _column(whole, "loss")[-1] < _column(whole, "loss")[0]

    crash_after(cut, 8)
    saved = SavedState(checkpoints(cut.output_path)[0].path)
    assert saved.whole(scale_key("scale")).item() == 2.0 ** (28 - sum(spoilt[:6]))
    train(cut)
    assert _column(cut, "loss") == _column(whole, "loss")


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_refuses_it(make_run: MakeRun, engine: str) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=f"engine: {engine} computes in bfloat16 or float32.*Use fsdp2"):
        train(make_run(engine=engine, precision="fp16"))
