"""How fast a run goes: tokens and samples per second, model FLOP utilisation, memory, time left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llava_npu.devices import Device
from llava_npu.devices.marks import Mark
from llava_npu.devices.peaks import published
from llava_npu.models.flops import FlopModel, causal_pairs
from llava_npu.training.batches import MicroBatch


@dataclass(frozen=True)
class DevicePeak:
    """What one device could compute at most: dense TFLOP/s in the run's type, and where the figure comes from."""

    tflops: float
    source: str


@dataclass(frozen=True)
class Throughput:
    """Since the last report.

    Attributes:
        tokens_per_second, samples_per_second: over all devices, padding not counted.
        tflops_per_device: useful operations of the model per second, in 10¹² (`models/flops.py`): no padding, nothing
            computed twice, frozen parts as what they cost.
        mfu: that, as a part of the device's peak; None where the peak is unknown, or was measured too low (by a busy
            machine) and the part would be more than all.
        input_wait: part of the time in which the device had nothing to do because data was not there yet.
        peak_memory_gib: of this process's device, since the run began.
        seconds: since the run's start or continuation.
        seconds_left: until the last step, at the pace since then.
    """

    tokens_per_second: float
    samples_per_second: float
    tflops_per_device: float
    mfu: float | None
    input_wait: float
    peak_memory_gib: float
    seconds: float
    seconds_left: float


class ThroughputMeter:
    """Adds up the work of a run's steps on the host, and has the device say when it was done; waits for nothing.

    FLOPs are those of this process: what the others compute meanwhile is as much, by the plan.
    """

    def __init__(
        self,
        flops: FlopModel,
        device: Device,
        peak: DevicePeak | None,
        *,
        cached_features: bool,
    ) -> None:
        self._flops = flops
        self._device = device
        self.peak = peak
        self._cached_features = cached_features
        self._started = self._reported = device.mark()
        self._steps = 0
        self._reset()

    def add(self, micro_batches: Sequence[MicroBatch], tokens: int, samples: int) -> None:
        """A step that is done: this process's share of it, and its tokens and samples over all processes."""
        self._steps += 1
        self._tokens += tokens
        self._samples += samples
        self._work += sum(
            self._flops.count(
                each.tokens,
                causal_pairs(each.sample_lengths) // each.parts,
                each.supervised_tokens,
                each.images,
                cached_features=self._cached_features,
            ).total
            for each in micro_batches
        )

    def waited(self, before: Mark, after: Mark) -> None:
        """Between two marks the host gave the device nothing, because it waited for data."""
        self._waits.append((before, after))

    def report(self, steps_left: int) -> Callable[[], Throughput]:
        """The speed since the last report; to be called once the device has done what it was given by now."""
        now, before, started = self._device.mark(), self._reported, self._started
        tokens, samples, work, steps = self._tokens, self._samples, self._work, self._steps
        waits = self._waits

        def speed() -> Throughput:
            seconds, in_all = now.seconds_since(before), now.seconds_since(started)
            tflops = work / seconds / 1e12
            mfu = tflops / self.peak.tflops if self.peak else None
            return Throughput(
                tokens_per_second=tokens / seconds,
                samples_per_second=samples / seconds,
                tflops_per_device=tflops,
                mfu=mfu if mfu is None or mfu <= 1 else None,
                input_wait=sum(after.seconds_since(before) for before, after in waits) / seconds,
                peak_memory_gib=self._device.memory().peak / 2**30,
                seconds=in_all,
                seconds_left=in_all / steps * steps_left,
            )

        self._reported = now
        self._reset()
        return speed

    def resume(self) -> None:
        """Restarts the clock after something other than training, such as validation."""
        self._reported = self._device.mark()

    def _reset(self) -> None:
        self._tokens = self._samples = self._work = 0
        self._waits: list[tuple[Mark, Mark]] = []


def find_peak(device: Device, compute_dtype: torch.dtype | None) -> DevicePeak | None:
    """The device's published peak or, where it is not listed, one measured in a second; None if it is simulated."""
    if device.simulated:
        return None
    source = "published" if published(device.name) else "measured"
    return DevicePeak(device.peak_tflops(compute_dtype or torch.float32), source)
