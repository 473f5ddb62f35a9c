"""The model's forward passes over cached sequences: prefill, which reuses what is cached already, and decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from llava_npu.inference.features import FeatureCache
from llava_npu.inference.kv_cache import KVCache
from llava_npu.inference.prefix_cache import PrefixCache, prefix_keys
from llava_npu.inference.request import ImageInput, Prompt
from llava_npu.models.loaded import LoadedModel
from llava_npu.ops.attention.transformers_interface import ATTENTION_NAME
from llava_npu.ops.fuse import install_kernels

_TOKENS_AT_ONCE_ON_HOST = 1024
# A sequence waits for one that begins alike if that saves a third of its own work, and at least this many tokens.
_WORTH_WAITING = 3
_WORTH_WAITING_TOKENS = 32
_LEAST_SHARE = 4  # a cached beginning of less than a quarter of the prompt is computed again: it would save little


def tokens_at_once(device: torch.device) -> int | None:
    """How many tokens a pass should hold at most; None for as many as there are.

    A host's matrix products are no faster for more rows than one long prompt or image has, and all else is slower once
    what it works on has left the caches.
    """
    return _TOKENS_AT_ONCE_ON_HOST if device.type == "cpu" else None


@dataclass(frozen=True)
class Prefill:
    """A sequence to be computed into a row of the cache.

    Attributes:
        row: where.
        prompt: the sequence.
        num_outputs: of how many of its last tokens the hidden states are wanted.
    """

    row: int
    prompt: Prompt
    num_outputs: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.input_ids)

    def usable(self, cached: int) -> int:
        """How many of the cached tokens can be used: outputs have to be computed, and images stay whole."""
        start = min(cached, self.num_tokens - self.num_outputs)
        start = next((image.start for image in self.prompt.images if image.start < start < image.end), start)
        return start if start * _LEAST_SHARE >= self.num_tokens else 0


class ModelRunner:
    """One model with its caches. Whoever uses it keeps account of its rows.

    Attributes:
        loaded: the model.
        cache: keys and values of the sequences in the making.
    """

    def __init__(self, loaded: LoadedModel, cache: KVCache, prefix_tokens: int, features: FeatureCache | None = None):
        """
        Args:
            loaded: the model, as `llava_npu.load` returns it.
            cache: a row for each sequence.
            prefix_tokens: how many tokens of computed sequences are kept for those that begin alike.
            features: keeps the tower's output; by default the runner's own.
        """
        self.loaded = loaded
        self.cache = cache
        self._prefixes = PrefixCache(cache, prefix_tokens)
        self._features = features or FeatureCache(loaded)
        if loaded.model.config._attn_implementation != ATTENTION_NAME:
            install_kernels(loaded.model, loaded.model.device)

    def num_cached(self, prompt: Prompt) -> int:
        """How many tokens of a prompt would not be computed."""
        keys = prefix_keys(prompt.input_ids, prompt.images)
        return Prefill(0, prompt).usable(self._num_known(keys))

    def prefill(self, prefills: Sequence[Prefill]) -> list[torch.Tensor]:
        """Computes sequences; what several begin with alike is computed by the first of them.

        A sequence waits for another that is being computed if that saves a third of its own work.

        Returns:
            For each the hidden states of its last `num_outputs` tokens, (num_outputs, hidden size).
        """
        hidden: dict[int, torch.Tensor] = {}
        keys = [prefix_keys(each.prompt.input_ids, each.prompt.images) for each in prefills]
        pending = list(range(len(prefills)))
        while pending:
            starts, pending = self._without_waiting(prefills, keys, pending)
            for number, start in starts.items():  # before anything new is kept, which could displace it
                if start:
                    self._prefixes.restore(prefills[number].row, keys[number][:start])
            for portion in self._portions({n: prefills[n].num_tokens - start for n, start in starts.items()}):
                outputs = self._compute([prefills[n] for n in portion], [starts[n] for n in portion])
                hidden.update(zip(portion, outputs, strict=True))
                for number in portion:
                    self._prefixes.save(prefills[number].row, keys[number])
        return [hidden[number] for number in range(len(prefills))]

    def _without_waiting(
        self, prefills: Sequence[Prefill], keys: Sequence[Sequence[bytes]], pending: Sequence[int]
    ) -> tuple[dict[int, int], list[int]]:
        """Which sequences are computed now, each from which token on; and which wait for one of them."""
        now: dict[int, int] = {}
        later = []
        being_computed: set[bytes] = set()
        for number in pending:
            each = prefills[number]
            start = each.usable(self._num_known(keys[number]))
            saved = each.usable(self._num_known(keys[number], being_computed)) - start
            if saved >= max(_WORTH_WAITING_TOKENS, (each.num_tokens - start) / _WORTH_WAITING):
                later.append(number)
            else:
                now[number] = start
                being_computed.update(keys[number])
        return now, later

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """One token for each of the first rows: the last hidden states, (rows, hidden size).

        Args:
            tokens: the latest of each sequence, which is not in the cache yet.
            lengths: how many tokens of each are.
        """
        model = self.loaded.model
        output = model.model(
            input_ids=torch.tensor(tokens)[:, None].to(model.device),
            position_ids=self.cache.expect_decode(lengths, model.device),
            past_key_values=self.cache,
            key_lengths=[length + 1 for length in lengths],
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def keep(self, row: int, tokens: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Keeps a sequence, all of whose tokens are in its row, for those that begin alike."""
        self._prefixes.save(row, prefix_keys(tokens, images))

    def _num_known(self, keys: Sequence[bytes], more: Set[bytes] = frozenset()) -> int:
        """How many tokens at the beginning are cached, or in `more`."""
        unknown = (place for place, key in enumerate(keys) if key not in self._prefixes and key not in more)
        return next(unknown, len(keys))

    def _portions(self, lengths: Mapping[int, int]) -> list[list[int]]:
        """What is computed in one pass: at least one sequence, and no more tokens than suit the device."""
        most = tokens_at_once(self.loaded.model.device)
        portions: list[list[int]] = []
        tokens = 0
        for number, length in lengths.items():
            tokens += length
            if not portions or (most is not None and tokens > most):
                portions.append([])
                tokens = length
            portions[-1].append(number)
        return portions

    def _compute(self, prefills: Sequence[Prefill], starts: Sequence[int]) -> list[torch.Tensor]:
        """One pass, packed end to end, of what is behind the first `starts` tokens of each sequence."""
        model = self.loaded.model
        rests = [each.prompt.input_ids[start:] for each, start in zip(prefills, starts, strict=True)]
        lengths = [len(rest) for rest in rests]
        key_lengths = [each.num_tokens for each in prefills]
        self.cache.expect_prefill([each.row for each in prefills], starts, lengths)
        packed = [token for rest in rests for token in rest]
        input_ids = torch.tensor([packed]).to(model.device)
        positions = torch.cat([torch.arange(s, end) for s, end in zip(starts, key_lengths, strict=True)])
        images = [
            i for each, start in zip(prefills, starts, strict=True) for i in each.prompt.images if i.start >= start
        ]
        output = model.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=positions[None].to(model.device),
            past_key_values=self.cache,
            sequence_lengths=lengths,
            key_lengths=key_lengths,
            use_cache=True,
            **self._image_inputs(images, packed),
        )
        ends = torch.tensor(lengths).cumsum(0).tolist()
        hidden = output.last_hidden_state[0]  # (tokens, hidden size)
        return [hidden[end - each.num_outputs : end] for each, end in zip(prefills, ends, strict=True)]

    def _image_inputs(self, images: Sequence[ImageInput], packed: Sequence[int]) -> dict[str, Any]:
        if not images:
            return {}
        model = self.loaded.model
        image_token = model.config.image_token_id
        return {
            "vision_features": torch.cat(self._features.encode(images)).to(model.device),
            "image_sizes": [image.size for image in images],
            "image_positions": torch.tensor([at for at, token in enumerate(packed) if token == image_token]).to(
                model.device
            ),
        }
