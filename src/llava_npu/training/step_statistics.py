"""What the processes of a run tell each other before every step, from host to host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from llava_npu.training.batches import MicroBatch


@dataclass(frozen=True)
class StepStatistics:
    """Sums over a step's micro-batches and processes.

    Attributes:
        ready: in how many processes the numbers of an earlier step have arrived.
        stops: how many processes have been asked to stop.
    """

    supervised_tokens: int
    tokens: int
    replaced: int
    ready: int
    stops: int


def sum_over_processes(
    micro_batches: Sequence[MicroBatch], ready: bool, stops: bool, accelerator: Accelerator
) -> StepStatistics:
    """Adds up what each process knows before a step; every process calls it."""
    counts = [
        sum(micro_batch.supervised_tokens for micro_batch in micro_batches),
        sum(micro_batch.tokens for micro_batch in micro_batches),
        sum(len(micro_batch.replaced) for micro_batch in micro_batches),
        int(ready),
        int(stops),
    ]
    if accelerator.num_processes > 1:  # on the host: the device need not be waited for
        counts = accelerator.reduce(torch.tensor(counts)).tolist()
    return StepStatistics(*counts)
