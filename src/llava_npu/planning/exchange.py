"""What devices that work on one sequence together send each other (`ops/attention/sequence_parallel.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class SequenceExchange:
    """Bytes for each token that a device has, in one layer.

    Attributes:
        parts: devices that share a sequence.
        layers: of the language model.
        to_heads: of queries, keys and values, before attention.
        back: of its results.
    """

    parts: int
    layers: int
    to_heads: int
    back: int

    @classmethod
    def between(cls, parts: int, text_config: PreTrainedConfig, compute_dtype: torch.dtype | None) -> SequenceExchange:
        """In the type computed in; None: float32."""
        heads = text_config.num_attention_heads
        if parts == 1:
            return cls(1, text_config.num_hidden_layers, 0, 0)
        keys = math.lcm(getattr(text_config, "num_key_value_heads", None) or heads, parts)
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        value = head_dim * (compute_dtype or torch.float32).itemsize
        return cls(parts, text_config.num_hidden_layers, (heads + 2 * keys) * value, heads * value)

    def calls(self, recomputed: float) -> int:
        """All-to-alls in a micro-batch: two in each layer's forward pass, likewise backward and computed again.

        Args:
            recomputed: the part of the layers in which activations are.
        """
        return 0 if self.parts == 1 else round(2 * self.layers * (2 + recomputed))

    def sent(self, tokens: float, recomputed: float) -> int:
        """Bytes that a device sends for this many of its tokens; its own part stays. `recomputed`: as for `calls`."""
        passes = 2 + recomputed
        away = (self.parts - 1) / self.parts
        return round(tokens * self.layers * passes * away * (self.to_heads + self.back))
