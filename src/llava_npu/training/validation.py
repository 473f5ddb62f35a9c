"""The loss on samples that are held out of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from llava_npu.config import RunConfig
from llava_npu.data.conversation.labels import IGNORE_INDEX
from llava_npu.data.dataset import ConversationDataset, Sample
from llava_npu.data.plan import Indices
from llava_npu.devices import Device
from llava_npu.training.batches import Share, StepLoader
from llava_npu.training.checkpointing.state import random_state, restore_random_state
from llava_npu.training.engines import Engine

_FEW = 256  # loading this few samples is faster than starting processes to load them


def is_due(step: int, num_steps: int, every: int) -> bool:
    """Whether the loss is computed after `step` steps: every `every` steps, and at the end."""
    return step % every == 0 or step == num_steps


def validation_loss(engine: Engine, dataset: ConversationDataset, device: Device, config: RunConfig) -> float:
    """Mean cross-entropy in nats per supervised token, over all samples and processes; every process calls it.

    Weights, random state and modes are afterwards what they were: a run that validates trains as one that does not.
    """
    accelerator, parts = engine.accelerator, config.sequence_parallel_size
    layout = _Once(len(dataset), accelerator.num_processes // parts, config.micro_batch_size)
    share = Share.of_process(accelerator.process_index, parts)
    loader = StepLoader(_Filled(dataset), layout, share, pin_memory=device.kind != "cpu")  # type: ignore[arg-type]
    generators = random_state(device)
    total, supervised = torch.zeros((), device=accelerator.device), 0
    with torch.no_grad(), _evaluation_mode(engine.objective):
        for (micro_batch,) in loader.steps(range(layout.num_steps), config.data.workers if len(dataset) > _FEW else 0):
            total += engine.loss(micro_batch.to(accelerator.device), micro_batch.sequence_lengths)
            supervised += micro_batch.supervised_tokens
    restore_random_state(generators, device)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total)
        supervised = int(accelerator.reduce(torch.tensor([supervised])).item())
    return float(total) / max(supervised, 1)


@dataclass(frozen=True)
class _Once:
    """A layout that takes every sample once, padded; what is short of whole micro-batches is filled with −1."""

    num_samples: int
    num_processes: int
    micro_batch_size: int

    @property
    def num_steps(self) -> int:
        return math.ceil(self.num_samples / (self.num_processes * self.micro_batch_size))

    @property
    def pack_length(self) -> None:
        return None

    def share(self, step: int, rank: int) -> Sequence[Indices]:
        start = (step * self.num_processes + rank) * self.micro_batch_size
        indices = np.arange(start, start + self.micro_batch_size)
        return [np.where(indices < self.num_samples, indices, -1)]

    def room(self, sample: int) -> None:
        return None


class _Filled:
    """A data set in which sample −1 is one of its samples from which nothing is learned."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self._dataset = dataset
        self.processor = dataset.processor

    def load(self, index: int, room: int | None) -> Sample:
        if index >= 0:
            return self._dataset.load(index, room)
        sample = self._dataset.load(0, room)
        return replace(sample, labels=torch.full_like(sample.labels, IGNORE_INDEX))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled in a worker, the data set is missing
            raise AttributeError(name)
        return getattr(self._dataset, name)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No dropout; afterwards each module is in the mode it was in."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True
