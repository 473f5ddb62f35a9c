"""Speed and MFU, from counts and a clock."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from llava_npu import devices
from llava_npu.config import RunConfig
from llava_npu.devices.cpu import CpuDevice
from llava_npu.devices.marks import HostMark
from llava_npu.models.flops import FlopModel, Flops
from llava_npu.training import train
from llava_npu.training.batches import MicroBatch
from llava_npu.training.monitoring.metrics import StepMetrics, read_metrics
from llava_npu.training.monitoring.progress import training_progress
from llava_npu.training.monitoring.throughput import DevicePeak, ThroughputMeter, find_peak

COSTS = FlopModel(
    token=Flops(10**9), pair=Flops(10**6), supervised=Flops(10**8), tower=Flops(10**10), projector=Flops(10**9)
)


class _At(HostMark):
    def __init__(self, time: float) -> None:
        self._time = time


def _micro_batch() -> MicroBatch:
    tensors = {"input_ids": torch.zeros(1, 16, dtype=torch.long), "pixel_values": torch.zeros(2, 3, 4, 4)}
    return MicroBatch(tensors, sequence_lengths=(4, 6, 6), sample_lengths=(4, 6), supervised_tokens=3)


@pytest.mark.parametrize("cached", [False, True])
def test_useful_work_per_second(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([_At(0.0), _At(2.0), _At(4.0)])
    monkeypatch.setattr(CpuDevice, "mark", lambda device: next(marks))
    peak = DevicePeak(1.0, "published")
    meter = ThroughputMeter(COSTS, devices.select("cpu"), peak, cached_features=cached)
    for _ in range(2):
        meter.add([_micro_batch()], tokens=20, samples=4)
    report = meter.report(steps_left=5)()
    # Per step 10 tokens, 10 + 21 pairs (not those of the padding), 3 supervised positions, 2 images.
    work = 10 * 10**9 + 31 * 10**6 + 3 * 10**8 + 2 * (10**9 if cached else 11 * 10**9)
    assert report.tflops_per_device == pytest.approx(2 * work / 2.0 / 1e12)
    assert report.mfu == pytest.approx(report.tflops_per_device)
    assert (report.tokens_per_second, report.samples_per_second) == (20, 4)
    assert report.seconds_left == 5.0  # two steps took two seconds
    meter.add([_micro_batch()], tokens=20, samples=4)
    assert meter.report(steps_left=0)().tokens_per_second == 10  # since the last report only


def test_waiting_for_data_is_measured_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([_At(0.0), _At(4.0)])
    monkeypatch.setattr(CpuDevice, "mark", lambda device: next(marks))
    meter = ThroughputMeter(COSTS, devices.select("cpu"), None, cached_features=False)
    for before, after in ((0.5, 1.0), (2.0, 2.5)):
        meter.waited(_At(before), _At(after))
        meter.add([_micro_batch()], tokens=20, samples=4)
    assert meter.report(steps_left=0)().input_wait == 0.25


def test_more_than_the_peak_is_not_shown_as_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([_At(0.0), _At(1.0)])
    monkeypatch.setattr(CpuDevice, "mark", lambda device: next(marks))
    meter = ThroughputMeter(COSTS, devices.select("cpu"), DevicePeak(1e-3, "measured"), cached_features=False)
    meter.add([_micro_batch()], tokens=20, samples=4)
    speed = meter.report(steps_left=0)()
    assert speed.tflops_per_device > 1e-3
    assert speed.mfu is None
    known = {"step": 1, "epoch": 1.0, "learning_rate": 0.1, "learning_rates": {}, "supervised_tokens": 3}
    metrics = StepMetrics(
        loss=1.0, grad_norm=1.0, tokens=20, samples=4, **known, **{**asdict(speed), "input_wait": 0.4}
    )
    console = Console(file=io.StringIO(), width=200)
    with training_progress(console, "align", 1, 0, visible=True) as progress:
        progress.peak = meter.peak
        progress.show(metrics)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "MFU unknown (faster than the measured peak) · waiting for data 40%" in shown


def test_a_run_reports_its_speed(make_run: Callable[..., RunConfig], device: torch.device) -> None:
    run = make_run(max_steps=2, pack_tokens=512)
    train(run)
    for line in read_metrics(run.output_path):
        assert line["tflops_per_device"] > 0
        assert line["peak_memory_gib"] > 0
        assert 0 < line["input_wait"] < 1
        if device.type == "npu":
            assert line["mfu"] is None  # a simulation has no peak
        else:
            assert 0 < line["mfu"] < 1
    assert line["seconds_left"] == 0


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_where_no_peak_is_published_it_is_measured(dtype: torch.dtype | None) -> None:
    peak = find_peak(devices.select("cpu"), dtype)
    assert peak is not None
    assert peak.source == "measured"
    assert peak.tflops > 0
    in_float32 = devices.select("cpu").peak_tflops(torch.float32)
    assert peak.tflops == in_float32  # emulated float16 is nothing to compare a run with
