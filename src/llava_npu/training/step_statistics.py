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
        failures: how many processes could not load their micro-batches.
    """

    supervised_tokens: int
    tokens: int
    replaced: int
    ready: int
    stops: int
    failures: int


def sum_over_processes(
    micro_batches: Sequence[MicroBatch] | None, ready: bool, stops: bool, accelerator: Accelerator
) -> StepStatistics:
    """Adds up what each process knows before a step; every process calls it.

    Args:
        micro_batches: None: they could not be loaded.
    """
    failed, micro_batches = micro_batches is None, micro_batches or ()
    counts = [
        sum(micro_batch.supervised_tokens for micro_batch in micro_batches),
        sum(micro_batch.tokens for micro_batch in micro_batches),
        sum(len(micro_batch.replaced) for micro_batch in micro_batches),
        int(ready),
        int(stops),
        int(failed),
    ]
    if accelerator.num_processes > 1:  # on the host: the device need not be waited for
        counts = accelerator.reduce(torch.tensor(counts)).tolist()
    return StepStatistics(*counts)
