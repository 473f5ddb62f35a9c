"""What the implementation of attention for one kind of device is given, and what it has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from llava_npu.ops.attention.lengths import Lengths


@dataclass(frozen=True)
class Scoring:
    """What becomes of queries' scores of keys.

    Attributes:
        scale: of the scores; None: 1/√head_dim.
        dropout: probability of dropping an attention weight.
        softcap: scores s become `softcap · tanh(s / softcap)` (Gemma 2, arXiv:2408.00118). `functional` has the plain
            implementation compute it, on every kind of device.
    """

    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None


@dataclass(frozen=True)
class AttentionInputs:
    """What every attention takes.

    Attributes:
        query: (batch, heads, query_length, head_dim), or packed (tokens, heads, head_dim).
        key: the same with key_value_heads and key_length, or packed (key_tokens, key_value_heads, head_dim).
        value: as `key`; its head_dim may be smaller.
        scale, dropout, softcap: as in `Scoring`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    dropout: float = 0.0
    softcap: float | None = None

    @property
    def learns(self) -> bool:
        """Whether a gradient is wanted."""
        tensors = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def with_tensors(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionInputs:
        return replace(self, query=query, key=key, value=value)


class AttentionImplementation(Protocol):
    """Attention on one kind of device; `functional` has checked the inputs and taken out queries that see nothing."""

    def packed(self, inputs: AttentionInputs, lengths: Lengths, causal: bool, window: int | None) -> torch.Tensor:
        """Within each of several sequences laid end to end; `window` is given with `causal` only."""

    def batched(self, inputs: AttentionInputs, causal: bool) -> torch.Tensor:
        """Over sequences of one length; causal is aligned at the end."""

    def masked(self, inputs: AttentionInputs, mask: torch.Tensor) -> torch.Tensor:
        """Under a boolean mask, (batch or 1, heads or 1, query_length, key_length), True = may attend."""

    def cached(self, inputs: AttentionInputs, key_lengths: Sequence[int]) -> torch.Tensor:
        """One query per sequence; of a sequence's keys, the first `key_lengths` are valid, and at least one is."""
