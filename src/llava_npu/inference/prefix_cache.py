"""Keys and values of what prompts begin with, kept for the next prompt that begins alike.

All turns of a conversation, all users who ask about one image, and all benchmark questions about it share the image and
the text before it: vision tower and prefill run once for them. The design is vLLM's automatic prefix caching (Kwon et
al. 2023, arXiv:2309.06180): a sequence is cut into blocks of equally many tokens, and a block is known by the hash of
all tokens up to its end, in which an image counts by its content. Memory is fixed; the block used longest ago makes
room for a new one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch

from llava_npu.inference.kv_cache import KVCache
from llava_npu.inference.request import ImageInput

BLOCK = 8  # tokens


def block_keys(tokens: Sequence[int], images: Sequence[ImageInput]) -> list[bytes]:
    """The key of each whole block of a sequence."""
    digest = hashlib.blake2b(digest_size=16)
    starts = {image.start: image for image in images}
    keys = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        digest.update(array("q", tokens[start : start + BLOCK]).tobytes())
        for place in range(start, start + BLOCK):
            if place in starts:
                digest.update(f"{place} {starts[place].key} {starts[place].size}".encode())
        keys.append(digest.digest())
    return keys


class PrefixCache:
    """Blocks of keys and values kept next to the rows of a `KVCache`, found by the hash of what leads up to them."""

    def __init__(self, rows: KVCache, max_tokens: int):
        """`max_tokens`: how many tokens' keys and values are kept; 0 keeps none."""
        self._rows = rows
        self._capacity = max_tokens // BLOCK
        self._free = list(range(self._capacity))
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # the one used longest ago first
        self._pool: torch.Tensor | None = None  # (blocks, layers, 2, heads, BLOCK, head_dim)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def restore(self, row: int, keys: Sequence[bytes]) -> None:
        """Copies blocks, all of which are here, to the beginning of a row."""
        assert self._pool is not None
        slots = torch.tensor([self._slots[key] for key in keys], device=self._pool.device)
        blocks = self._pool.index_select(0, slots).permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        self._rows.ensure_length(blocks.shape[3])
        self._rows.store[:, :, row, :, : blocks.shape[3]] = blocks  # (layers, 2, heads, tokens, head_dim)
        self._touch(keys)

    def save(self, row: int, keys: Sequence[bytes]) -> None:
        """Keeps the blocks at the beginning of a row that are not here yet."""
        keys = keys[: self._capacity]
        self._touch(keys)
        missing = [place for place, key in enumerate(keys) if key not in self._slots]
        if not missing:
            return
        store = self._rows.store
        if self._pool is None:
            layers, both, _, heads, _, head_dim = store.shape
            self._pool = store.new_empty(self._capacity, layers, both, heads, BLOCK, head_dim)
        slots = [self._take_slot() for _ in missing]
        device = store.device
        blocks = store[:, :, row, :, : len(keys) * BLOCK].unflatten(3, (len(keys), BLOCK)).permute(3, 0, 1, 2, 4, 5)
        chosen = blocks if len(missing) == len(keys) else blocks[torch.tensor(missing, device=device)]
        self._pool[torch.tensor(slots, device=device)] = chosen
        self._slots.update(zip((keys[place] for place in missing), slots, strict=True))
        self._touch(keys)

    def _take_slot(self) -> int:
        return self._free.pop() if self._free else self._slots.popitem(last=False)[1]

    def _touch(self, keys: Sequence[bytes]) -> None:
        """The first block last: a sequence loses its end before its beginning."""
        for key in reversed(keys):
            if key in self._slots:
                self._slots.move_to_end(key)
