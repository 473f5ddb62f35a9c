"""Keys and values of what prompts begin with, kept for the next prompt that begins alike.

All turns of a conversation, all users who ask about one image, and all benchmark questions about it share the image and
the text before it: vision tower and prefill run once for them. The design is vLLM's automatic prefix caching (Kwon et
al. 2023, arXiv:2309.06180): a token is known by the hash of all tokens up to it, in which an image counts by its
content. Memory is fixed; what was used longest ago makes room. It is kept token by token, as in SGLang (Zheng et al.
2024, arXiv:2312.07104), not in blocks: questions about an image differ right behind it, and a block that holds an
image's end and a question's beginning would fit no other question.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch

from llava_npu.inference.kv_cache import KVCache
from llava_npu.inference.request import ImageInput

_ID_BYTES = array("q").itemsize


def prefix_keys(tokens: Sequence[int], images: Sequence[ImageInput]) -> list[bytes]:
    """For each token of a sequence the key of all up to it."""
    digest = hashlib.blake2b(digest_size=16)
    starts = {image.start: f"{image.start} {image.key} {image.size}".encode() for image in images}
    ids = array("q", tokens).tobytes()
    keys = []
    for place in range(len(tokens)):
        digest.update(ids[place * _ID_BYTES : (place + 1) * _ID_BYTES])
        if place in starts:
            digest.update(starts[place])
        keys.append(digest.digest())
    return keys


class PrefixCache:
    """Keys and values of tokens, kept next to the rows of a `KVCache` and found by the hash of all up to them."""

    def __init__(self, rows: KVCache, max_tokens: int):
        """`max_tokens`: how many tokens' keys and values are kept; 0 keeps none."""
        self._rows = rows
        self._capacity = max_tokens
        self._free = list(range(self._capacity))
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # the one used longest ago first
        self._pool: torch.Tensor | None = None  # (tokens, layers, 2, heads, head_dim)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def restore(self, row: int, keys: Sequence[bytes]) -> None:
        """Copies tokens, all of which are here, to the beginning of a row."""
        assert self._pool is not None
        slots = torch.tensor([self._slots[key] for key in keys], device=self._pool.device)
        self._rows.ensure_length(len(keys))
        # (tokens, layers, 2, heads, head_dim) to (layers, 2, heads, tokens, head_dim)
        self._rows.store[:, :, row, :, : len(keys)] = self._pool.index_select(0, slots).permute(1, 2, 3, 0, 4)
        self._touch(keys)

    def save(self, row: int, keys: Sequence[bytes]) -> None:
        """Keeps the tokens at the beginning of a row that are not here yet."""
        keys = keys[: self._capacity]
        self._touch(keys)
        missing = [place for place, key in enumerate(keys) if key not in self._slots]
        if not missing:
            return
        store = self._rows.store
        if self._pool is None:
            layers, both, _, heads, _, head_dim = store.shape
            self._pool = store.new_empty(self._capacity, layers, both, heads, head_dim)
        slots = torch.tensor([self._take_slot() for _ in missing])
        chosen = store[:, :, row].index_select(3, torch.tensor(missing, device=store.device))
        self._pool[slots.to(store.device)] = chosen.permute(3, 0, 1, 2, 4)
        self._slots.update(zip((keys[place] for place in missing), slots.tolist(), strict=True))
        self._touch(keys)

    def _take_slot(self) -> int:
        return self._free.pop() if self._free else self._slots.popitem(last=False)[1]

    def _touch(self, keys: Sequence[bytes]) -> None:
        """The first token last: a sequence loses its end before its beginning."""
        for key in reversed(keys):
            if key in self._slots:
                self._slots.move_to_end(key)
