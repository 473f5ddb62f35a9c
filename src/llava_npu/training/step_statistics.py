"""What the processes of a run tell each other before every step, from host to host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from llava_npu.training.batches import MicroBatch


@dataclass(frozen=True)
class Counts:
    """Of a step, over micro-batches and processes.

    Attributes:
        arrived: to how many processes numbers of an earlier step have come.
        stops: how many processes have been asked to stop.
    """

    supervised_tokens: int
    tokens: int
    replaced: int
    arrived: int
    stops: int


def count_together(micro_batches: Sequence[MicroBatch], arrived: bool, stops: bool, accelerator: Accelerator) -> Counts:
    """Adds up what each process knows before a step; every process calls it."""
    counts = [
        sum(micro_batch.supervised_tokens for micro_batch in micro_batches),
        sum(micro_batch.tokens for micro_batch in micro_batches),
        sum(len(micro_batch.replaced) for micro_batch in micro_batches),
        int(arrived),
        int(stops),
    ]
    if accelerator.num_processes > 1:  # on the host: the device need not be waited for
        counts = accelerator.reduce(torch.tensor(counts)).tolist()
    return Counts(*counts)
