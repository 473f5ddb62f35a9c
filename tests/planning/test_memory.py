"""Predicted against measured peaks, on each device of this machine; benchmarks/planning.py does a larger grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llava_npu.config import RunConfig
from llava_npu.ops.kernels.npu import attention as npu_attention
from llava_npu.planning.dry_run import BatchShape, fake_model, trace_step
from llava_npu.planning.memory import EngineChoice, StepShape, engine_choices, peak
from llava_npu.planning.tracing import Held, StepTrace, between
from llava_npu.training.engines import ModelSizes
from llava_npu.training.resolve import ResolvedRun
from support.benchmark_scripts import load_benchmark

MakeRun = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("planning")


@pytest.mark.slow
def test_predicted_peaks_are_those_of_whole_runs(
    benchmark: ModuleType, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exhaustive: bool
) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    npu_attention._compressed_causal_mask.cache_clear()  # an earlier test's table would not be this run's memory
    setting = benchmark.Setting
    grid = [
        setting("align", "mlp2x_gelu", 8, True, "bf16", cache_features=False),
        setting("finetune", "tokenpacker", 4, 3, "fp32", cache_features=False),
        setting("finetune", "mlp2x_gelu", 8, False, "fp32", cache_features=False, pack_tokens=512),
    ]
    if exhaustive:
        grid.append(setting("align", "resampler", 2, False, "fp32", cache_features=False))
        grid.append(setting("finetune", "c_abstractor", 8, False, "bf16", cache_features=True))
    for comparison in benchmark.compare(grid, tmp_path, device.type):
        predicted, measured = comparison.predicted, comparison.measured
        assert predicted == pytest.approx(measured, rel=0.1), comparison.setting


@pytest.mark.slow
def test_sizes_in_between_lie_on_a_line(make_run: MakeRun) -> None:
    run = make_run(precision="bf16")
    config = ResolvedRun(run).model

    def traced(rows: int) -> StepTrace:
        model = fake_model(config, run, torch.bfloat16, checkpointing=False)
        return trace_step(model, BatchShape(rows, 40, 10 * rows, rows), torch.bfloat16, "cpu")

    guessed = between(traced(2), 2, traced(4), 4, 7)
    assert _most(guessed).total == pytest.approx(_most(traced(7)).total, rel=0.01)


@pytest.mark.slow
def test_planning_for_an_npu_needs_none_and_leaves_nothing_behind(make_run: MakeRun) -> None:
    run = make_run()
    config = ResolvedRun(run).model
    model = fake_model(config, run, torch.bfloat16, checkpointing=False)
    shape = BatchShape(2, 40, 10, 2)
    fused, plain, again = (trace_step(model, shape, torch.bfloat16, kind) for kind in ("npu", "cpu", "npu"))
    assert fused == again
    assert _most(fused).activations < _most(plain).activations + 2048**2  # but for the mask, fused operators hold less


SIZES = ModelSizes(trained=7_500_000_000, frozen=0, largest_unit=0, rest=0, compute_bytes=2)
NOTHING = StepTrace((Held(gradients=1),), Held(gradients=1), 0)


def test_shards_are_those_of_the_zero_paper() -> None:
    """Rajbhandari et al. 2020, table 1: 7.5 B parameters on 64 devices; 16.6 GB in stage 2 and 1.9 GB in stage 3.

    The paper's gradients are 16-bit; ours are accumulated in float32, 2 bytes more per parameter and device.
    """
    more = 2 * SIZES.trained / 64
    for engine, paper in ((EngineChoice("zero2"), 16.6e9), (EngineChoice("zero3"), 1.9e9)):
        held = peak(engine, NOTHING, SIZES, StepShape(devices=64)).device
        assert held.total - held.buffers - more == pytest.approx(paper, rel=0.02)
    offload = EngineChoice("zero3", {"offload_optimizer": True, "offload_parameters": True})
    offloaded = peak(offload, NOTHING, SIZES, StepShape(devices=64))
    assert offloaded.device.total == offloaded.device.buffers
    assert offloaded.host == pytest.approx(18 * SIZES.trained / 64)


def test_every_engine_keeps_less_than_whole_copies() -> None:
    held = {each.label: peak(each, NOTHING, SIZES, StepShape(devices=8)).device for each in engine_choices()}
    kept = {engine: each.total - each.buffers for engine, each in held.items()}
    assert kept["ddp"] == 16 * SIZES.trained
    assert kept["fsdp2"] == 2 * SIZES.trained
    assert kept["ddp"] > kept["zero2"] > kept["zero3"] > kept["fsdp2"]
    assert kept["zero3+offload"] == kept["fsdp2+offload"] == 0
    hybrid = peak(EngineChoice("fsdp2", {"shard_group": 2}), NOTHING, SIZES, StepShape(devices=8)).device
    assert hybrid.optimizer == 4 * held["fsdp2"].optimizer
    assert held["ddp"].buffers == 4 * SIZES.trained  # buckets


def test_gradients_of_earlier_micro_batches_are_there_from_the_start() -> None:
    early, late = Held(activations=100, gradients=0), Held(activations=10, gradients=4_000)
    trace = StepTrace((early, late), replace(late, activations=0), 0)
    sizes = ModelSizes(trained=1_000, frozen=0, largest_unit=0, rest=0, compute_bytes=4)
    once, twice = (
        peak(EngineChoice("ddp"), trace, sizes, StepShape(1, micro_batches)).device for micro_batches in (1, 2)
    )
    assert (once.activations, twice.activations) == (10, 100)
    assert once.gradients == twice.gradients == 4_000


def _most(trace: StepTrace) -> Held:
    return max(trace.moments, key=lambda held: held.total)
