"""The loss: summed cross-entropy over supervised tokens, logits computed for those positions only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.linear_cross_entropy import linear_cross_entropy

_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "pixel_values",
    "vision_features",
    "image_positions",
    "image_tokens",
    "image_sizes",
    "tokens_per_image",
)


class SupervisedLoss(nn.Module):
    """A model whose forward pass gives its loss, which is the form that distributed engines wrap.

    Args:
        always_encode: run the vision tower in batches of text alone too. Needed where processes gather its weights from
            each other, or its gradients: one that leaves it out would keep the others waiting for ever.
        sequence_group: processes that have a part of every batch each (`batches.part_of`); their losses add up.
    """

    def __init__(
        self,
        model: LlavaNpuForConditionalGeneration,
        always_encode: bool = False,
        sequence_group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        self.model = model
        self._always_encode = always_encode
        self._sequence_group = sequence_group

    def forward(self, batch: Mapping[str, Any], sequence_lengths: tuple[int, ...]) -> torch.Tensor:
        """Sum, not mean: the caller divides by the supervised tokens of the whole step, over devices and micro-batches.

        Args:
            batch: `input_ids`, `labels`, `position_ids`, `attention_mask` (batch, length); `supervised_positions`, the
                supervised tokens' indices into the flattened, shifted labels; and if there are images, `pixel_values`
                or `vision_features`, `image_positions`, with anyres `image_sizes`, and where they vary
                `tokens_per_image`, host integers too. A part of longer rows has a label more, that of the token after
                it, unless it is the last.
            sequence_lengths: tokens of each sequence, row after row, the padding behind one counted as another; host
                integers, so that no layer asks the device.
        """
        inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        if "pixel_values" not in batch and "vision_features" not in batch:
            # Engines that wait for every parameter's gradient, or gather weights, would wait for this process for ever.
            inputs |= self.model.model.dummy_image_inputs(batch["input_ids"].device, encode=self._always_encode)
        hidden = self.model.model(
            **inputs, sequence_lengths=sequence_lengths, sequence_group=self._sequence_group, use_cache=False
        ).last_hidden_state  # (batch, length, hidden)
        labels = batch["labels"][:, 1:]
        head = self.model.lm_head
        return linear_cross_entropy(
            hidden[:, : labels.shape[1]],
            head.weight,
            labels,
            bias=head.bias,
            positions=batch["supervised_positions"],
            transform=head.transform,
        )
