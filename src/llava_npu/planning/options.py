"""The ways to run something: engine, recomputed layers, micro-batch size; what each takes, and which to choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from llava_npu.config import RunConfig
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.planning.dry_run import BatchShape, fake_model, trace_step
from llava_npu.planning.exchange import SequenceExchange
from llava_npu.planning.memory import EngineChoice, PeakMemory, StepShape, engine_choices, peak
from llava_npu.planning.sizing import Sizing
from llava_npu.planning.target import Target
from llava_npu.planning.tracing import StepTrace, between
from llava_npu.training.engines.memory import ModelSizes, count_sizes
from llava_npu.training.parts import recomputable_layers, recompute_first

# Tokens in a micro-batch from which a device's matrix units are taken to be busy.
ENOUGH_TOKENS = 2048


@dataclass(frozen=True)
class Option:
    """One way to run it.

    Attributes:
        recomputed: layers in which activations are computed again in the backward pass, the first ones to run.
        at_configured: the peak with the micro-batches that the run configures.
        largest: `micro_batch_size`, or `pack_tokens` where samples are packed, that fits; 0: none does.
        at_largest: the peak with that; None where none fits.
    """

    engine: EngineChoice
    recomputed: int
    at_configured: PeakMemory
    largest: int
    at_largest: PeakMemory | None


class MemoryModel:
    """The peak of a run's step as a function of engine, recomputed layers and micro-batch size.

    Models and traces take seconds where a model is large: each is made once, when it is first needed, and sizes in
    between are read off a line through two traces.
    """

    def __init__(self, config: RunConfig, model: LlavaNpuConfig, sizing: Sizing, target: Target):
        self._config, self._model, self._sizing, self._target = config, model, sizing, target
        self._traces: dict[tuple[bool, int, int], StepTrace] = {}
        self._models: dict[tuple[bool, bool], LlavaNpuForConditionalGeneration] = {}

    @property
    def prepared(self) -> LlavaNpuForConditionalGeneration:
        """The model as it is trained, without numbers."""
        return self._fake_model(checkpointing=False, sharded=False)

    @cached_property
    def sizes(self) -> ModelSizes:
        return count_sizes(self.prepared, (self._target.compute_dtype or torch.float32).itemsize)

    @cached_property
    def exchange(self) -> SequenceExchange:
        return SequenceExchange.between(self._sizing.parts, self._model.text_config, self._target.compute_dtype)

    @cached_property
    def layers(self) -> int:
        """In how many layers activations can be recomputed."""
        return len(recomputable_layers(self.prepared))

    def configured_recomputed(self, engine: EngineChoice) -> int:
        """In how many layers they are, by `gradient_checkpointing`; `engine`: that of the run."""
        checkpointing = self._config.gradient_checkpointing
        if checkpointing == "auto":
            return self.least_recomputed(engine, self._target.usable_memory)
        return self.layers * checkpointing if isinstance(checkpointing, bool) else checkpointing

    def recomputed_part(self, recomputed: int) -> float:
        """The part of the language model's layers among the first `recomputed` ones."""
        of_text = self._model.text_config.num_hidden_layers
        return max(0, recomputed - (self.layers - of_text)) / of_text

    def least_recomputed(self, engine: EngineChoice, usable: int) -> int:
        """The fewest layers with whose recomputation micro-batches as configured fit into `usable` bytes; all where not
        even that does.

        Memory falls about evenly with each layer, so that a line from what fits to what does not soon finds them.
        """
        size = self._sizing.configured
        low, high = 0, self.layers
        over, spare = (self.peak(engine, count, size).device.total - usable for count in (low, high))
        if over <= 0:
            return 0
        if spare > 0:
            return high
        while high - low > 1:
            middle = min(max(low + math.ceil(over * (high - low) / (over - spare)), low + 1), high - 1)
            more = self.peak(engine, middle, size).device.total - usable
            low, over, high, spare = (middle, more, high, spare) if more > 0 else (low, over, middle, more)
        return high

    def trace(self, engine: EngineChoice, recomputed: int, size: int) -> StepTrace:
        """`size`: of a micro-batch, in what `sizing` counts."""
        return self._trace(self._gathered_in_16_bits(engine), recomputed, size)

    def peak(self, engine: EngineChoice, recomputed: int, size: int) -> PeakMemory:
        """`size`: as for `trace`."""
        trace = self.trace(engine, recomputed, size)
        shape, sizing = self._sizing.shape(size), self._sizing
        step = StepShape(
            self._target.count,
            sizing.accumulated(size),
            on_cpu=self._target.kind == "cpu",
            exchanged=2 * shape.rows * shape.length * self.exchange.to_heads,
        )
        return peak(engine, trace, self.sizes, step)

    def typical_trace(self, engine: EngineChoice, recomputed: int) -> StepTrace:
        """Of an average micro-batch, as configured; `trace` is of the one that takes the most memory."""
        shape = self._sizing.typical(self._sizing.configured)
        return self._run(self._gathered_in_16_bits(engine), recomputed, shape)

    def _gathered_in_16_bits(self, engine: EngineChoice) -> bool:
        """Whether layers run in other types than under `ddp`; where little is trained, the difference is negligible."""
        sizes = self.sizes
        trains_little = sizes.trained < 0.01 * (sizes.trained + sizes.frozen)
        return not engine.type.keeps_whole_layers and self._target.compute_dtype is not None and not trains_little

    def _trace(self, sharded: bool, recomputed: int, size: int) -> StepTrace:
        first = self._sizing.configured
        if size == first:
            return self._traced(sharded, recomputed, first)
        second = 2 * first
        traces = (self._traced(sharded, recomputed, each) for each in (first, second))
        return between(next(traces), first, next(traces), second, size)

    def _traced(self, sharded: bool, recomputed: int, size: int) -> StepTrace:
        key = (sharded, recomputed, size)
        if key not in self._traces:
            self._traces[key] = self._run(sharded, recomputed, self._sizing.shape(size))
        return self._traces[key]

    def _run(self, sharded: bool, recomputed: int, shape: BatchShape) -> StepTrace:
        model = self._fake_model(bool(recomputed), sharded)
        recompute_first(model, recomputed)
        return trace_step(model, shape, self._target.compute_dtype, self._target.kind)

    def _fake_model(self, checkpointing: bool, sharded: bool) -> LlavaNpuForConditionalGeneration:
        config, dtype, key = self._config, self._target.compute_dtype, (checkpointing, sharded)
        if key not in self._models:
            self._models[key] = fake_model(self._model, config, dtype, checkpointing, sharded=sharded)
        return self._models[key]


def options(memory: MemoryModel, sizing: Sizing, target: Target, configured: EngineChoice) -> list[Option]:
    """Every engine that makes sense on this many devices, and the configured one.

    Each without recomputation, with recomputation in all layers, and where only the latter fits, in the fewest with
    which it does; the configured one also as configured.
    """
    engines = _engines(target)
    if configured not in engines:
        engines.append(configured)
    some = [(engine, memory.least_recomputed(engine, target.usable_memory)) for engine in engines]
    own = (configured, memory.configured_recomputed(configured))
    between_none_and_all = [way for way in (*some, *([] if own in some else [own])) if 0 < way[1] < memory.layers]
    ways = [
        *((engine, 0) for engine in engines),
        *between_none_and_all,
        *((engine, memory.layers) for engine in engines),
    ]
    return [_option(memory, engine, recomputed, sizing, target.usable_memory) for engine, recomputed in ways]


def recommended(choices: Sequence[Option], sizing: Sizing) -> Option | None:
    """The first of these that fits with enough tokens in a micro-batch, else the first that fits at all.

    In this order: whole weights before shards (nothing is gathered), little recomputation before more (all of it adds
    a third or more of the work; gathering a layer takes less where devices are linked), and the host's memory last.
    """
    ordered = sorted(choices, key=lambda choice: (bool(choice.engine.on_host), choice.recomputed))
    fitting = [choice for choice in ordered if choice.largest]
    busy = (choice for choice in fitting if sizing.tokens(choice.largest) / sizing.parts >= ENOUGH_TOKENS)
    return next(busy, next(iter(fitting), None))


def _option(memory: MemoryModel, engine: EngineChoice, recomputed: int, sizing: Sizing, usable: int) -> Option:
    at_configured = memory.peak(engine, recomputed, sizing.configured)
    peaks = ((size, memory.peak(engine, recomputed, size)) for size in sizing.candidates)
    largest, at_largest = next((pair for pair in peaks if pair[1].device.total <= usable), (0, None))
    return Option(engine, recomputed, at_configured, largest, at_largest)


def _engines(target: Target) -> list[EngineChoice]:
    """On one device there is nothing to share, but the host's memory may still help an accelerator."""
    return [
        choice
        for choice in engine_choices()
        if (choice.type.keeps_whole_layers or target.count > 1 or choice.on_host)
        and not (target.kind == "cpu" and choice.on_host)
    ]
