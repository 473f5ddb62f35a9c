"""The time that a step takes, operation by operation.

Of a listed product, at least: an operation takes the longer of its FLOPs at the published peak and its bytes (inputs
and outputs, each once) at the bandwidth (Williams et al. 2009, "Roofline"). What engines send counts where it takes
longer than all that is computed meanwhile; what devices that share a sequence send each other counts whole, as
attention waits for it. Launches, the host, latency and anything that caches save are left out: a bound to compare
choices by, not a forecast.

Of this machine's CPU, about: every operation takes what one of its kind and size was measured to take
(`devices/host_speeds.py`). An estimate, in the processor time of the run's threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llava_npu.devices.host_speeds import HostSpeeds
from llava_npu.models.flops import FlopModel
from llava_npu.planning.memory import EngineChoice
from llava_npu.planning.sizing import Sizing
from llava_npu.planning.target import Target
from llava_npu.planning.tracing import StepTrace, TracedOperation
from llava_npu.training.engines.memory import ModelSizes

# AdamW in float32 reads weight, gradient and two moments, and writes all but the gradient. Before it the gradient is
# read for its norm, and read and written to be scaled to it.
_STEP_BYTES = 28 + 12


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on one device: at least, or on a measured CPU about.

    Attributes:
        matrix, attention: matrix products; attention, without what a fused kernel computes twice.
        vector: all other operations of forward and backward pass.
        optimizer: AdamW.
        communication: what is sent and not hidden behind computing.
    """

    matrix: float
    attention: float
    vector: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class StepWork:
    """What a device does in a step: `micro_batches` like the traced one, and what it sends in it.

    Attributes:
        trace: of an average micro-batch.
        attention_flops, exchanged: of the whole step.
    """

    trace: StepTrace
    micro_batches: int
    attention_flops: float
    exchanged: int


def step_work(trace: StepTrace, flops: FlopModel, sizing: Sizing, recomputed: float, exchanged: int) -> StepWork:
    """The work of a run's step, of which an average micro-batch, as configured, was traced.

    Args:
        recomputed: the part of the language model's layers in which activations are.
    """
    pairs = sizing.per_group * sizing.samples.mean_pairs / sizing.parts
    attention = pairs * (flops.pair.total + recomputed * flops.pair.forward)
    return StepWork(trace, sizing.accumulated(sizing.configured), attention, exchanged)


def roofline(work: StepWork, engine: EngineChoice, model: ModelSizes, target: Target) -> StepTime | None:
    """None where the device's peak or its memory's bandwidth is not known."""
    if target.peak_flops is None or target.bandwidth is None:
        return None
    seconds = {"matrix": 0.0, "attention": 0.0, "vector": 0.0}
    for operation, times in work.trace.operations.items():
        kind = operation.kind if operation.kind in seconds else "vector"
        seconds[kind] += times * work.micro_batches * _seconds(operation, target)
    seconds["attention"] = max(seconds["attention"], work.attention_flops / target.peak_flops)
    shards = 1 if engine.type.keeps_whole_layers else target.count
    # All but the first micro-batch's gradients are added to those before: two are read, one is written.
    seconds["vector"] += (work.micro_batches - 1) * 12 * model.trained / shards / target.bandwidth
    on_device = "optimizer" not in engine.on_host
    optimizer = _STEP_BYTES * model.trained / shards / target.bandwidth if on_device else 0.0
    communication = 0.0
    if target.count > 1 and target.link is not None:
        hidden = sum(seconds.values())
        sent = _sent(engine, model, work.micro_batches) * (target.count - 1) / target.count
        communication = max(0.0, sent / target.link - hidden) + work.exchanged / target.link
    return StepTime(**seconds, optimizer=optimizer, communication=communication)


def _seconds(operation: TracedOperation, target: Target) -> float:
    assert target.peak_flops is not None
    assert target.bandwidth is not None
    if target.host_speeds is not None:
        return _host_seconds(operation, target.host_speeds)
    # Of causal attention half the pairs count, which `attention_flops` says.
    flops = 0 if operation.kind == "attention" else operation.flops
    return max(flops / target.peak_flops, (operation.read + operation.written) / target.bandwidth)


def _host_seconds(operation: TracedOperation, speeds: HostSpeeds) -> float:
    if operation.kind == "view":
        return speeds.call
    if operation.kind == "matrix":
        return speeds.call + operation.flops * speeds.product.at(*operation.shape)
    if operation.kind == "attention":
        backward = "backward" in operation.name
        queries, keys, dimension = operation.shape
        pairs = operation.flops / ((10 if backward else 4) * dimension)
        forward_table, backward_table = (
            (speeds.causal, speeds.causal_backward)
            if operation.causal
            else (speeds.attention, speeds.attention_backward)
        )
        table = backward_table if backward else forward_table
        return speeds.call + pairs * table.at(math.sqrt(queries * keys), dimension)
    moved = operation.read + 2 * operation.written
    table = speeds.strided if operation.strided else speeds.streamed
    functions = (seconds for name, seconds in speeds.functions.items() if name in operation.name)
    return speeds.call + max(moved * table.at(moved), operation.shape[0] * next(functions, 0.0))


def _sent(engine: EngineChoice, model: ModelSizes, micro_batches: int) -> float:
    """Bytes that one of very many devices sends in a step for weights and gradients."""
    gradients = 4 * model.trained
    if engine.type.keeps_whole_layers:
        return 2 * gradients  # all-reduce: every shard goes around twice
    if engine.type.shards_weights:  # gathered for the forward and the backward pass, gradients scattered
        return micro_batches * (2 * model.compute_bytes * (model.trained + model.frozen) + gradients)
    return micro_batches * gradients + model.compute_bytes * model.trained
