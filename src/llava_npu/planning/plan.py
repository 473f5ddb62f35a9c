"""A run's plan: its model, its memory under every engine, its work and time, and what to choose."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from llava_npu.config import RunConfig
from llava_npu.models.flops import Flops, flop_model
from llava_npu.planning.host import HostMemory, host_memory
from llava_npu.planning.memory import configured_engine
from llava_npu.planning.options import MemoryModel, Option, options, recommended
from llava_npu.planning.roofline import StepTime, roofline, step_work
from llava_npu.planning.samples import Samples, expected_samples
from llava_npu.planning.sizing import Sizing, choose_sizing
from llava_npu.planning.target import Target
from llava_npu.training.resolve import ResolvedRun


@dataclass(frozen=True)
class Work:
    """Operations and time.

    Attributes:
        sample: operations of an average sample.
        recomputed: what gradient checkpointing in all layers adds to them, as a part of them.
        padding: part of a micro-batch's tokens that is padding, on average; of packed samples hardly any.
        steps, total: of the whole run, in optimizer steps and operations; None where the number of samples is unknown.
        mfu: the part of the devices' peak that is taken to be reached, padding and recomputation not counted as work.
        hours: with that; None where the peak or the number of samples is unknown.
        parts: devices that work on each sequence together.
        exchanges: their all-to-alls in a micro-batch.
        exchanged: bytes that each sends in them, in an optimizer step.
        roofline: the least time of an optimizer step; None where the device's peak or bandwidth is unknown.
        best_hours, best_mfu: of the whole run, and of the devices' peak, at that; None likewise.
    """

    sample: Flops
    recomputed: float
    padding: float
    steps: int | None
    total: int | None
    mfu: float
    hours: float | None
    parts: int
    exchanges: int
    exchanged: int
    roofline: StepTime | None
    best_hours: float | None
    best_mfu: float | None


@dataclass(frozen=True)
class RunPlan:
    """What `llava-npu plan` shows.

    Attributes:
        parameters, trained: elements.
        size_key, size: of a micro-batch, as configured: `micro_batch_size` or `pack_tokens`.
        layers: in how many layers activations can be recomputed.
        options: every engine that makes sense on these devices, with no, some and all layers recomputed.
        hosts: memory of one node under each of them, in their order.
        configured: the run's own choice among them.
        recommended: what to choose; None where nothing fits.
        remarks: where figures come from.
    """

    target: Target
    stage: str
    parameters: int
    trained: int
    batch_size: int
    size_key: str
    size: int
    samples: Samples
    work: Work
    layers: int
    options: tuple[Option, ...]
    hosts: tuple[HostMemory, ...]
    configured: Option
    recommended: Option | None
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.configured.at_configured.device.total <= self.target.usable_memory

    def to_dict(self) -> dict[str, Any]:
        """For JSON; memory in bytes."""
        values = asdict(self)
        values["target"]["compute_dtype"] = str(self.target.compute_dtype or "float32").removeprefix("torch.")
        values["target"]["usable_memory"] = self.target.usable_memory
        samples = values["samples"]
        del samples["lengths"]
        samples["mean_length"] = self.samples.mean_length
        return {**values, "fits": self.fits}


def plan_run(run: ResolvedRun, target: Target, mfu: float) -> RunPlan:
    """Plans a run from configurations alone.

    Args:
        mfu: part of the devices' peak that the run is taken to reach, padding and recomputation not counted as work.

    Raises:
        UserError: a model's configuration cannot be had, or the batch does not divide over the devices.
    """
    run.check_model()
    config, remarks = run.config, list(run.remarks)
    samples = expected_samples(run)
    sizing = choose_sizing(config, samples, target.count)
    memory = MemoryModel(config, run.model, sizing, target)
    engine = configured_engine(config)
    choices = options(memory, sizing, target, engine)
    recomputed = memory.configured_recomputed(engine)
    if config.lora.base_bits is not None:
        remarks.append(f"weights that lora.base_bits={config.lora.base_bits} packs are counted as if they were not")
    return RunPlan(
        target=target,
        stage=config.stage,
        parameters=memory.sizes.trained + memory.sizes.frozen,
        trained=memory.sizes.trained,
        batch_size=config.batch_size,
        size_key=sizing.key,
        size=sizing.configured,
        samples=samples,
        work=_work(config, memory, sizing, target, mfu),
        layers=memory.layers,
        options=tuple(choices),
        hosts=tuple(
            host_memory(run, memory.prepared, choice.engine, choice.at_configured, target) for choice in choices
        ),
        configured=next(choice for choice in choices if (choice.engine, choice.recomputed) == (engine, recomputed)),
        recommended=recommended(choices, sizing),
        remarks=(*remarks, f"samples: {samples.source}"),
    )


def _work(config: RunConfig, memory: MemoryModel, sizing: Sizing, target: Target, mfu: float) -> Work:
    samples, flops, exchange = sizing.samples, flop_model(memory.prepared), memory.exchange
    sample = flops.count(  # of a thousand samples, so that means may be broken numbers
        round(1000 * samples.mean_length),
        round(1000 * samples.mean_pairs),
        round(1000 * samples.supervised),
        round(1000 * samples.images),
        cached_features=sizing.cached_features,
    )
    again = flops.token.forward * samples.mean_length + flops.pair.forward * samples.mean_pairs
    steps = _steps(config, samples)
    total = None if steps is None else steps * config.batch_size * sample.total // 1000
    rate = None if target.peak_flops is None else target.peak_flops * target.count * mfu
    engine = configured_engine(config)
    recomputed = memory.configured_recomputed(engine)
    part = memory.recomputed_part(recomputed)
    exchanged = exchange.sent(sizing.per_group * samples.mean_length / exchange.parts, part)
    least = planned_step_time(config, memory, sizing, target)
    step = config.batch_size * sample.total / 1000 / target.count
    return Work(
        sample=Flops(*(part // 1000 for part in (sample.forward, sample.data_gradient, sample.weight_gradient))),
        recomputed=1000 * again / sample.total,
        padding=0.0 if sizing.packed else 1 - samples.mean_length / samples.padded_length(sizing.configured),
        steps=steps,
        total=total,
        mfu=mfu,
        hours=None if total is None or rate is None else total / rate / 3600,
        parts=exchange.parts,
        exchanges=exchange.calls(part),
        exchanged=exchanged,
        roofline=least,
        best_hours=None if least is None or steps is None else steps * least.total / 3600,
        best_mfu=None if least is None or not target.peak_flops else step / least.total / target.peak_flops,
    )


def planned_step_time(config: RunConfig, memory: MemoryModel, sizing: Sizing, target: Target) -> StepTime | None:
    """The least time of an optimizer step of the run as configured; None where the device's speeds are unknown."""
    engine, exchange = configured_engine(config), memory.exchange
    recomputed = memory.configured_recomputed(engine)
    part = memory.recomputed_part(recomputed)
    exchanged = exchange.sent(sizing.per_group * sizing.samples.mean_length / exchange.parts, part)
    trace = memory.typical_trace(engine, recomputed)
    work = step_work(trace, flop_model(memory.prepared), sizing, part, exchanged)
    return roofline(work, engine, memory.sizes, target)


def _steps(config: RunConfig, samples: Samples) -> int | None:
    if samples.count is None:
        return config.max_steps
    steps = math.ceil(samples.count * config.epochs / config.batch_size)
    return min(steps, config.max_steps or steps)
