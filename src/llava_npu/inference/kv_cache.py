"""Keys and values of all answers in the making, in memory of a fixed size.

Every answer has a row. A prompt's keys are written to its row when it is read; each step adds one position to every
row. Rows in use are always the first ones, so that a step computes on them without copying: when an answer ends, the
last row moves into its place.

    keys, values of a layer: (rows, key_value_heads, length, head_dim)

Shapes change only with the number of rows and, in strides, with the longest answer: on an NPU each new shape costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_STRIDE = 64


class RowCache(Cache):
    """transformers' cache interface over rows; the engine says before each forward pass what it will be."""

    def __init__(self, num_layers: int, rows: int, length: int):
        """
        Args:
            rows: answers at once.
            length: most tokens of one, prompt included.
        """
        self.rows = rows
        self.length = length
        self._write: _WritePrompts | _WriteNext | None = None
        super().__init__(layers=[_Layer(self) for _ in range(num_layers)])

    def expect_prompts(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Next comes one forward pass of prompts, packed end to end, into these rows."""
        self._write = _WritePrompts(tuple(rows), tuple(lengths))

    def expect_next(self, lengths: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Next comes one token for each of the first rows, which hold so many tokens.

        Returns:
            Their positions, (rows, 1), and the attention mask, (rows, 1, 1, visible), True where a token attends to.
        """
        positions = torch.tensor(lengths).to(device)
        visible = min(self.length, -(-(max(lengths) + 1) // _STRIDE) * _STRIDE)
        self._write = _WriteNext(torch.arange(len(lengths), device=device), positions, visible)
        mask = torch.arange(visible, device=device) <= positions[:, None]
        return positions[:, None], mask[:, None, None, :]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the `length` tokens of a row into another."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]


class _WritePrompts:
    def __init__(self, rows: tuple[int, ...], lengths: tuple[int, ...]):
        self.rows = rows
        self.lengths = lengths

    @property
    def seen(self) -> int:
        return 0

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        # states: (1, heads, tokens of all prompts, head_dim)
        for row, length, prompt in zip(self.rows, self.lengths, states[0].split(self.lengths, dim=1), strict=True):
            stored[row, :, :length] = prompt
        return states


class _WriteNext:
    def __init__(self, rows: torch.Tensor, positions: torch.Tensor, visible: int):
        self.rows = rows
        self.positions = positions
        self.visible = visible

    @property
    def seen(self) -> int:
        return self.visible - 1

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible, 0

    def write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        # states: (rows, heads, 1, head_dim)
        stored[self.rows, :, self.positions] = states[:, :, 0]
        return stored[: len(self.rows), :, : self.visible]


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: RowCache):
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not whatever memory held: a position that is masked out still takes part, times zero.
        self.keys, self.values = (
            states.new_zeros(self._cache.rows, states.shape[1], self._cache.length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        write = self._expected()
        return write.write(self.keys, key_states), write.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._expected().mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self._expected().seen

    def get_max_length(self) -> int:
        return self._cache.length

    def _expected(self) -> _WritePrompts | _WriteNext:
        assert self._cache._write is not None, "say what the forward pass will be"
        return self._cache._write
