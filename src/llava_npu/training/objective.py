"""The loss: summed cross-entropy over supervised tokens, logits computed for those positions only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.linear_cross_entropy import linear_cross_entropy


class SupervisedLoss(nn.Module):
    """A model whose forward pass gives its loss, which is the form that distributed engines wrap."""

    def __init__(self, model: LlavaNpuForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum, not mean: the caller divides by the supervised tokens of the whole step, over devices and micro-batches.

        Args:
            batch: `input_ids`, `labels`, `attention_mask` (batch, length), `positions` (supervised tokens' indices into
                the flattened, shifted labels), and `pixel_values` or `vision_features` if there are images.
        """
        inputs = {
            name: batch[name]
            for name in ("input_ids", "attention_mask", "pixel_values", "vision_features")
            if name in batch
        }
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state  # (batch, length, hidden)
        loss = linear_cross_entropy(
            hidden[:, :-1], self.model.lm_head.weight, batch["labels"][:, 1:], positions=batch["positions"]
        )
        if "pixel_values" in batch or "vision_features" in batch:
            return loss
        # A batch of text alone leaves the projector out; engines that wait for every parameter's gradient would hang.
        return loss + 0.0 * self.model.model.project_nothing().sum()


def supervised_positions(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Indices of the supervised tokens in the flattened, shifted labels; found where the batch is made."""
    return (labels[:, 1:].flatten() != ignore_index).nonzero().flatten()
