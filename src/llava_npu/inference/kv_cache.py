"""Keys and values of all sequences being generated, in memory of a fixed place.

Every sequence has a row. A prompt's keys are written to its row by prefill; each decoding step adds one position to
every row. Rows in use are always the first ones, so that a step computes on them without copying: when a sequence ends,
the last row moves into its place.

    store: (layers, 2, rows, key_value_heads, length, head_dim), 2 for keys and values

Shapes change only with the number of rows and, in steps, with the longest sequence: on an NPU each new shape costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from llava_npu.errors import UserError

_GROWTH = 256  # positions


class KVCache(Cache):
    """transformers' cache interface over rows; the runner says before each forward pass what it will be."""

    def __init__(self, num_layers: int, rows: int, max_length: int, *, reserve: bool):
        """
        Args:
            rows: sequences at once.
            max_length: most tokens of one, prompt included.
            reserve: take the memory for `max_length` with the first pass; otherwise it grows with the sequences.
        """
        self.rows = rows
        self.max_length = max_length
        self._length = max_length if reserve else 0
        self._store: torch.Tensor | None = None
        self._pass: _Prefill | _Decode | None = None
        super().__init__(layers=[_Layer(self, number) for number in range(num_layers)])

    @property
    def store(self) -> torch.Tensor:
        assert self._store is not None, "no forward pass has run yet"
        return self._store

    def expect_prefill(self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Next comes one forward pass of sequences packed end to end.

        Args:
            rows: where each is.
            starts: how many of its tokens the row holds already.
            lengths: how many follow in this pass.
        """
        self.ensure_length(max(start + length for start, length in zip(starts, lengths, strict=True)))
        self._pass = _Prefill(tuple(rows), tuple(starts), tuple(lengths))

    def expect_decode(self, lengths: Sequence[int], device: torch.device) -> torch.Tensor:
        """Next comes one token for each of the first rows, which hold `lengths` tokens: its positions, (rows, 1)."""
        self.ensure_length(max(lengths) + 1)
        positions = torch.tensor(lengths).to(device)
        self._pass = _Decode(torch.arange(len(lengths), device=device), positions, max(lengths) + 1)
        return positions[:, None]

    def ensure_length(self, length: int) -> None:
        """Makes every row at least this long."""
        if length <= self._length:
            return
        self._length = min(self.max_length, -(-max(length, self._length * 3 // 2) // _GROWTH) * _GROWTH)
        if self._store is not None:
            old = self._store
            self._store = old.new_zeros(*old.shape[:4], self._length, old.shape[5])
            self._store[..., : old.shape[4], :] = old

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the `length` tokens of a row into another."""
        self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]

    def _of_layer(self, number: int, key_states: torch.Tensor, value_states: torch.Tensor) -> torch.Tensor:
        """(2, rows, heads, length, head_dim), allocated by the first layer."""
        heads, head_dim = key_states.shape[1], key_states.shape[3]
        if self._store is None:
            # Zeros, not whatever memory held: a position that is masked out still takes part, times zero.
            shape = (len(self.layers), 2, self.rows, heads, self._length, head_dim)
            self._store = key_states.new_zeros(shape)
        here = self._store[number]
        if (heads, head_dim) != (here.shape[2], here.shape[4]) or value_states.shape[3] != head_dim:
            raise UserError(
                f"layer {number} keeps keys of {heads} × {head_dim} and values of {value_states.shape[3]} numbers per "
                f"token, the first layer {here.shape[2]} × {here.shape[4]}: this engine needs layers of one shape. "
                "Use transformers' generate() for this model."
            )
        return here


@dataclass(frozen=True)
class _Prefill:
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def seen(self) -> int:
        return 0

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        # stored: (rows, heads, length, head_dim); states: (1, heads, tokens of all sequences, head_dim)
        spans = list(zip(self.rows, self.starts, self.lengths, strict=True))
        for (row, start, length), new in zip(spans, states[0].split(self.lengths, dim=1), strict=True):
            stored[row, :, start : start + length] = new
        if not any(self.starts):
            return states
        return torch.cat([stored[row, :, : start + length] for row, start, length in spans], dim=1)[None]


@dataclass(frozen=True)
class _Decode:
    rows: torch.Tensor
    positions: torch.Tensor
    visible: int

    @property
    def seen(self) -> int:
        return self.visible - 1

    def mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible, 0

    def write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        # states: (rows, heads, 1, head_dim)
        stored[self.rows, :, self.positions] = states[:, :, 0]
        return stored[: len(self.rows)]  # whole rows: `key_lengths` says what is valid, and no device has to copy them


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: KVCache, number: int):
        super().__init__()
        self._cache = cache
        self._number = number

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._cache._of_layer(self._number, key_states, value_states)
        write = self._expected()
        return write.write(keys, key_states), write.write(values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._expected().mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self._expected().seen

    def get_max_length(self) -> int:
        return self._cache.max_length

    def _expected(self) -> _Prefill | _Decode:
        assert self._cache._pass is not None, "say what the forward pass will be"
        return self._cache._pass
