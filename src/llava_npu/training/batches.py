"""The batches of a run, step by step, for one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader

from llava_npu.data.dataset import ConversationDataset, Sample, collate
from llava_npu.data.plan import Plan, micro_batches
from llava_npu.training.objective import supervised_positions


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, and the counts that are known before it, on the host.

    Attributes:
        tensors: the model's inputs, and `positions` of the supervised tokens.
        supervised_tokens: how many tokens are learned from.
        tokens: how many there are, padding not counted.
    """

    tensors: dict[str, torch.Tensor]
    supervised_tokens: int
    tokens: int

    def pin_memory(self) -> MicroBatch:
        """Copies into memory from which an accelerator can fetch while the host goes on."""
        return MicroBatch(
            {name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.supervised_tokens, self.tokens
        )

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}


def steps(
    dataset: ConversationDataset,
    plan: Plan,
    *,
    first_step: int,
    last_step: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[list[MicroBatch]]:
    """Each optimizer step's micro-batches of this process, from `first_step` up to `last_step` (exclusive).

    The order is a pure function of the plan: it does not depend on where a run was interrupted or on the workers.
    """
    shares = [
        micro_batches(plan.step(step), rank, world_size, micro_batch_size) for step in range(first_step, last_step)
    ]
    pad_token_id = dataset.processor.tokenizer.pad_token_id
    loader = DataLoader(
        dataset,
        batch_sampler=[indices.tolist() for share in shares for indices in share],
        collate_fn=partial(_collate, pad_token_id=pad_token_id),
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,  # accelerators do not survive a fork
        persistent_workers=False,
    )
    batches = iter(loader)
    return ([next(batches) for _ in share] for share in shares)


def _collate(samples: Sequence[Sample], pad_token_id: int) -> MicroBatch:
    tensors = collate(samples, pad_token_id)
    tensors["positions"] = supervised_positions(tensors["labels"])
    return MicroBatch(tensors, len(tensors["positions"]), int(tensors["attention_mask"].sum()))
