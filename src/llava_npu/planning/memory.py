"""The memory of one device under each engine, from the trace of a step and what the engine shards.

With Ψ weights of which T learn, c bytes per element computed in, and N devices, a device keeps

| engine | weights | gradients | optimizer |
|---|---|---|---|
| ddp | 4 T + c (Ψ − T) | 4 T, and 4 T of buckets | 8 T |
| fsdp2 | (4 T + c (Ψ − T)) / N | 4 T / N | 8 T / N |
| zero2 | c Ψ | 4 T / N | (8 + 4) T / N |
| zero3 | c Ψ / N | 4 T / N | (8 + 4) T / N |
| …+offload | on the host | on the host | on the host |

The (8 + 4) are AdamW's two moments and, where c is 2, DeepSpeed's float32 copy of the weights. What is gathered and
sent comes on top, as "buffers": whole layers for a moment, buckets, and gradients on their way.

Sources: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 3; Ren et al. 2021, ZeRO-Offload (arXiv:2101.06840);
Zhao et al. 2023, PyTorch FSDP (arXiv:2304.11277), section 3.2 (the peak is the shards and the largest unit); PyTorch's
DistributedDataParallel, `gradient_as_bucket_view` (without it, buckets double the gradients). Activations, logits and
gradients' lifetimes are the trace's own (`tracing.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from llava_npu.config import RunConfig
from llava_npu.planning.tracing import Held, Trace

# Elements that DeepSpeed sends at once (`training/engines/zero.py`).
BUCKET = 200_000_000


@dataclass(frozen=True)
class Engine:
    """An engine with the options that decide where things are kept.

    Attributes:
        kind: as in the run's configuration.
        offload_optimizer, offload_weights: to the host's memory; gradients go with the optimizer.
        shard_group: devices that hold one copy together (`fsdp2.shard_group`); None: all.
    """

    kind: str
    offload_optimizer: bool = False
    offload_weights: bool = False
    shard_group: int | None = None

    @property
    def name(self) -> str:
        if self.offload_weights or (self.kind == "zero2" and self.offload_optimizer):
            return f"{self.kind}+offload"
        return f"{self.kind}+optimizer offload" if self.offload_optimizer else self.kind

    @property
    def settings(self) -> dict[str, str]:
        """What to write in a run's configuration, as `key=value`."""
        settings = {"engine": self.kind}
        if self.kind == "fsdp2" and self.offload_weights:
            settings["fsdp2.offload"] = "true"
        elif self.kind != "fsdp2":
            settings |= {"zero.offload_optimizer": "true"} if self.offload_optimizer else {}
            settings |= {"zero.offload_parameters": "true"} if self.offload_weights else {}
        return settings


ENGINES = (
    Engine("ddp"),
    Engine("fsdp2"),
    Engine("zero2"),
    Engine("zero3"),
    Engine("fsdp2", offload_optimizer=True, offload_weights=True),
    Engine("zero3", offload_optimizer=True, offload_weights=True),
)


def configured_engine(config: RunConfig) -> Engine:
    """The engine of a run."""
    if config.engine == "fsdp2":
        offload = config.fsdp2.offload
        return Engine("fsdp2", offload, offload, config.fsdp2.shard_group)
    return Engine(config.engine, config.zero.offload_optimizer, config.zero.offload_parameters)


@dataclass(frozen=True)
class Sizes:
    """Elements of a model.

    Attributes:
        trained, frozen: of what learns, and of what does not.
        largest_unit: of the largest layer, that is gathered as one.
        rest: of what is in no layer (embeddings, head, last norm), and under FSDP stays gathered.
        compute_bytes: of an element of the type computed in.
    """

    trained: int
    frozen: int
    largest_unit: int
    rest: int
    compute_bytes: int


def sizes(model: nn.Module, compute_bytes: int) -> Sizes:
    """Counts a model; the layers are those that transformers says must not be split, and the projector."""
    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    projector = model.get_submodule("model.multi_modal_projector")
    units = [module for module in model.modules() if type(module).__name__ in layers or module is projector]
    in_units = {id(parameter) for unit in units for parameter in unit.parameters()}
    every = list(model.parameters())
    return Sizes(
        _elements(parameter for parameter in every if parameter.requires_grad),
        _elements(parameter for parameter in every if not parameter.requires_grad),
        max((_elements(unit.parameters()) for unit in units), default=0),
        _elements(parameter for parameter in every if id(parameter) not in in_units),
        compute_bytes,
    )


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class Peak:
    """Bytes of one device at its peak, and of the host for one device, that an engine takes."""

    device: Held
    host: int


def peak(
    engine: Engine, trace: Trace, model: Sizes, devices: int, micro_batches: int = 1, on_host: bool = False
) -> Peak:
    """The peak of a step.

    Args:
        trace: of one micro-batch; for the engines that shard, of a model that is in the type computed in as a whole.
        devices: how many share the work.
        micro_batches: of a step. From the first of several on, gradients are there.
        on_host: whether the device's memory is the host's, where a step's other micro-batches wait.
    """
    kept, passing = _kept(engine, model, devices), _passing(engine, model, devices)
    away = Held(
        kept.weights * engine.offload_weights,
        kept.gradients * engine.offload_optimizer,
        kept.optimizer * engine.offload_optimizer,
    )
    kept = Held(kept.weights - away.weights, kept.gradients - away.gradients, kept.optimizer - away.optimizer)
    waiting = (micro_batches - 1) * trace.inputs if on_host else 0
    all_gradients = trace.before_step.gradients or 1
    moments = [
        replace(
            kept,
            gradients=kept.gradients if micro_batches > 1 else kept.gradients * moment.gradients // all_gradients,
            copies=moment.copies,
            activations=moment.activations,
            logits=moment.logits,
            buffers=moment.buffers + passing + waiting,
        )
        for moment in trace.moments
    ]
    # At the optimizer's step nothing is gathered, and fused AdamW makes nothing on the way.
    rest = trace.before_step
    buffers = rest.buffers + (passing if engine.kind == "ddp" else 0)
    moments.append(replace(kept, activations=rest.activations, buffers=buffers))
    return Peak(max(moments, key=lambda held: held.total), away.total)


def _kept(engine: Engine, model: Sizes, devices: int) -> Held:
    """What is there all the time."""
    trained, frozen, c = model.trained, model.frozen, model.compute_bytes
    if engine.kind == "ddp":
        return Held(4 * trained + c * frozen, 4 * trained, 8 * trained)
    if engine.kind == "fsdp2":
        weights, shards = 4 * trained + c * frozen, engine.shard_group or devices
        return Held(*(-(-part // shards) for part in (weights, 4 * trained, 8 * trained)))
    masters = 4 if c < 4 else 0
    weights = c * (trained + frozen)
    return Held(
        weights if engine.kind == "zero2" else -(-weights // devices),
        -(-4 * trained // devices),
        -(-(8 + masters) * trained // devices),
    )


def _passing(engine: Engine, model: Sizes, devices: int) -> int:
    """What is gathered, and gradients on their way, at the worst moment."""
    trained, c, unit = model.trained, model.compute_bytes, model.largest_unit
    if engine.kind == "ddp":
        return 4 * trained if devices > 1 else 0
    bucket = min(BUCKET, trained)
    if engine.kind == "fsdp2":
        # A layer, the next one as it arrives (as sent, and as weights); its gradients, and those as they are sent.
        gathered = c * (model.rest + 3 * unit)
        return gathered + ((c + 4) * unit if trained else 0)
    if engine.kind == "zero2":
        return 2 * c * bucket
    # A layer and what is fetched ahead; two buckets of gradients.
    return c * (model.rest + unit + min(BUCKET, trained + model.frozen)) + 2 * c * bucket
