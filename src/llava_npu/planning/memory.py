"""The memory of one device at its peak, from the trace of a step and what the run's engine says that it keeps.

Activations, logits and gradients' lifetimes come from the trace (`tracing.py`); what is kept from step to step,
gathered and sent comes from the engine (`Engine.memory` in `training/engines/`, with sources).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from llava_npu.config import RunConfig
from llava_npu.planning.tracing import Held, StepTrace
from llava_npu.training.engines import Engine, ModelSizes, engines, find_engine
from llava_npu.training.engines.registry import engine_options


@dataclass(frozen=True)
class EngineChoice:
    """An engine with its options, those left out at their defaults."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> type[Engine]:
        return find_engine(self.name)

    @property
    def on_host(self) -> frozenset[str]:
        """Which of weights, gradients and optimizer are in the host's memory."""
        return self.type.on_host(engine_options(self.name, self.options))

    @property
    def label(self) -> str:
        """As tables name it."""
        offload = "+offload" if "weights" in self.on_host else "+optimizer offload" if self.on_host else ""
        return self.name + offload

    @property
    def settings(self) -> dict[str, str]:
        """What to write in a run's configuration, as `key=value`."""
        options = {
            f"engine_options.{key}": str(value).lower() if isinstance(value, bool) else str(value)
            for key, value in self.options.items()
        }
        return {"engine": self.name, **options}


def configured_engine(config: RunConfig) -> EngineChoice:
    """The engine of a run."""
    options = engine_options(config.engine, config.engine_options)
    return EngineChoice(config.engine, options.model_dump(exclude_defaults=True))


def engine_choices() -> list[EngineChoice]:
    """Every registered engine with each of its option sets that a plan compares."""
    choices = [EngineChoice(engine.name, dict(options)) for engine in engines() for options in engine.alternatives]
    return sorted(choices, key=lambda choice: bool(choice.options))  # the plain ones first


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one device at its peak, and of the host for one device, that an engine takes."""

    device: Held
    host: int


@dataclass(frozen=True)
class StepShape:
    """How a step is divided.

    Attributes:
        devices: how many share the work.
        micro_batches: of a step, one after the other. From the first of several on, gradients are there.
        on_cpu: whether the device's memory is the host's, where a step's other micro-batches wait.
        exchanged: bytes that a layer's attention has to send and has received where sequences are split.
    """

    devices: int
    micro_batches: int = 1
    on_cpu: bool = False
    exchanged: int = 0


def peak(engine: EngineChoice, trace: StepTrace, model: ModelSizes, step: StepShape) -> PeakMemory:
    """The peak of a step.

    Args:
        trace: of one micro-batch; for engines that gather layers, of a model all in the type computed in.
    """
    memory = engine.type.memory(engine_options(engine.name, engine.options), model, step.devices)
    whole = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer")}
    away = engine.on_host
    kept = Held(**{name: 0 if name in away else size for name, size in whole.items()})
    waiting = (step.micro_batches - 1) * trace.inputs if step.on_cpu else 0
    all_gradients = trace.before_step.gradients or 1
    moments = [
        replace(
            kept,
            gradients=kept.gradients if step.micro_batches > 1 else kept.gradients * moment.gradients // all_gradients,
            copies=moment.copies,
            activations=moment.activations,
            logits=moment.logits,
            buffers=moment.buffers + memory.passing + waiting + step.exchanged,
        )
        for moment in trace.moments
    ]
    # At the optimizer's step nothing is gathered, and fused AdamW makes nothing on the way.
    rest = trace.before_step
    moments.append(replace(kept, activations=rest.activations, buffers=rest.buffers + memory.passing_at_step))
    return PeakMemory(max(moments, key=lambda held: held.total), sum(whole[name] for name in away))
