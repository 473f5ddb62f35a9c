"""These attentions, offered to transformers models as one attention implementation named "llava_npu".

transformers calls two functions of an implementation: once per forward pass, one that makes the mask, and in every
layer, one that attends. Ours makes no mask tensor. It makes a `BatchMask`, which knows what the batch looks like and
which all layers share, so that what must be asked of the device (is anything padded, and where?) is asked at most once
per forward pass, and only if a layer needs it.

A batch whose lengths are known on the host is computed under `known_lengths` (integers that add up to batch × length,
row after row; padding at the end of a row is a sequence of its own). The mask carries them to every layer, so that no
layer has to pass arguments on (StableLM's does not), and nothing is asked of the device at all. Such a batch needs its
own `position_ids`, restarting at every sequence, and an `attention_mask` of ones: without one, transformers itself
reads the positions back to find the sequences. Attention that gets another mask while lengths are known refuses.

A decoding step over a cache of fixed size states `key_lengths`: how many keys of each row are valid, the new token's
included. The cache then returns its rows whole, and no mask is made.

Source: transformers' attention interface, https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from llava_npu.errors import UserError
from llava_npu.ops.attention.functional import (
    autocast,
    batched_attention,
    cached_attention,
    masked_attention,
    packed_attention,
)
from llava_npu.ops.attention.implementation import Scoring
from llava_npu.ops.attention.sdpa import band_mask, lengths_mask
from llava_npu.ops.attention.sequence_parallel import split_attention

ATTENTION_NAME = "llava_npu"

_UNSUPPORTED = ("position_bias", "s_aux", "output_attentions")


@dataclass(frozen=True)
class KnownLengths:
    """What the host knows of a batch.

    Attributes:
        sequence: lengths of packed sequences, row after row; None: one query for each row.
        key: with a cache, how many keys each sequence has: packed end to end next to `sequence`, or of each row the
            first ones. None: as many as queries.
        group: processes that have an equal part of every row each, while the lengths are of the whole rows.
    """

    sequence: Sequence[int] | None = None
    key: Sequence[int] | None = None
    group: dist.ProcessGroup | None = None

    @property
    def longest(self) -> int:
        """Keys of the longest sequence."""
        return max(self.key or self.sequence or (0,))


_known: ContextVar[KnownLengths | None] = ContextVar("known_lengths", default=None)


@contextmanager
def known_lengths(
    sequence_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[None]:
    """States the lengths of the batch that a language model computes inside; without any, nothing is stated."""
    given = sequence_lengths is not None or key_lengths is not None
    token = _known.set(KnownLengths(sequence_lengths, key_lengths, group) if given else None)
    try:
        yield
    finally:
        _known.reset(token)


def register_attention() -> str:
    """Makes the implementation known to transformers; returns its name, for `attn_implementation=`."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, make_batch_mask)
    return ATTENTION_NAME


def keep_attention_out_of_compiled_graphs() -> None:
    """For `torch.compile`: attention is called between graphs, as it is.

    Its kernels are written by hand anyway, and lengths on the host, other ones with every batch, would be constants of
    a graph: each batch would be compiled again.
    """
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(attention_forward))


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switches a built model, its language model and its vision tower included, to this implementation."""
    model.set_attn_implementation(register_attention())


class BatchMask:
    """Which tokens of a batch are real, shared by all layers of a forward pass.

    Not a dataclass on purpose: FSDP takes dataclasses in a module's inputs apart.
    """

    def __init__(
        self,
        real: torch.Tensor | None,
        query_length: int,
        causal: bool,
        lengths: KnownLengths | None = None,
        window: int | None = None,
    ) -> None:
        """
        Args:
            real: (batch, key_length), True for tokens, False for padding; None where nothing is padded.
            lengths: what the host knows of the batch; then nothing else is needed.
            window: with `lengths`, the number of latest keys that a query sees.
        """
        self._real = real
        self.query_length = query_length
        self.causal = causal
        self.known = lengths
        self.window = window

    @cached_property
    def host(self) -> torch.Tensor | None:
        """`real` on the host, or None where nothing is padded. On an accelerator, the one wait of a forward pass."""
        if self._real is None:
            return None
        host = self._real.cpu()
        return None if bool(host.all()) else host

    @property
    def is_padded(self) -> bool:
        return self.host is not None

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each row."""
        assert self.host is not None
        return tuple(self.host.sum(1).tolist())

    @cached_property
    def positions(self) -> torch.Tensor:
        """(real tokens,): where they are in the flattened batch, on the device."""
        assert self.host is not None
        assert self._real is not None
        return self.host.flatten().nonzero().squeeze(1).to(self._real.device, non_blocking=True)

    @cached_property
    def dense(self) -> torch.Tensor:
        """(batch, 1, query_length, key_length), True where a query may attend to a key."""
        assert self._real is not None
        mask = self._real[:, None, None, :]
        if not self.causal or self.query_length == 1:
            return mask.expand(-1, 1, self.query_length, -1)
        key_length = self._real.shape[1]
        return mask & band_mask(self.query_length, key_length, key_length, self._real.device)


def make_batch_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> BatchMask | torch.Tensor:
    """transformers' mask interface: called once per forward pass (and once per kind of layer).

    Returns:
        A `BatchMask` for causal and bidirectional attention over the whole of each row, and wherever lengths are known;
        for every other pattern, transformers' own boolean mask (batch, 1, q_length, kv_length), True = may attend.
    """
    if (lengths := _known.get()) is not None:
        window = local_size if local_size is not None and lengths.longest > local_size else None
        # A size is that of a sliding window, or of the chunks of Llama 4.
        slides = local_size is not None and getattr(kwargs.get("config"), "attention_chunk_size", None) is None
        plain = mask_function in (causal_mask_function, bidirectional_mask_function) or local_size is not None
        fits = plain and (window is None or slides)
        # Some models make masks that no layer of theirs uses: what does not fit is refused where it is used.
        causal = mask_function is not bidirectional_mask_function
        return BatchMask(None, q_length, causal, lengths if fits else None, window)
    within_window = allow_is_causal_skip and local_size is not None and kv_length <= local_size
    causal = mask_function is causal_mask_function or within_window
    # The keys end where the queries do: not so in a cache of fixed size, whose tail is still empty.
    aligned = not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length
    bidirectional = mask_function is bidirectional_mask_function
    covers = attention_mask is None or attention_mask.shape[-1] == kv_offset + kv_length
    if covers and (bidirectional or (causal and aligned)):
        real = None if attention_mask is None else attention_mask[:, kv_offset:]
        return BatchMask(real, q_length, causal)
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **{**kwargs, "allow_is_bidirectional_skip": False},
    )
    assert mask is not None
    return mask


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BatchMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: called in every layer.

    Args:
        query: (batch, heads, query_length, head_dim).
        key, value: (batch, key_value_heads, key_length, head_dim).
        attention_mask: what `make_batch_mask` returned, a boolean mask of four dimensions, or None (a tower that asks
            for none).

    Returns:
        (batch, query_length, heads, head_dim), and None in place of the weights, which are never formed.

    Raises:
        UserError: for what this implementation cannot do (weights as output, biases, sinks), and where lengths are
            known that the mask does not carry.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UserError(
                f"attention implementation {ATTENTION_NAME!r}: {name} is not supported. "
                "Load the model with attn_implementation='eager' for it."
            )
    scoring = Scoring(scaling, dropout, softcap)
    if _known.get() is not None and not (isinstance(attention_mask, BatchMask) and attention_mask.known):
        raise UserError(
            f"{type(module).__name__} does not attend under transformers' mask, or under one that is neither causal "
            "nor a sliding window: the sequences of a pack would see each other"
        )
    if isinstance(attention_mask, BatchMask) and attention_mask.known is not None:
        out = _of_known_lengths(query, key, value, attention_mask, scoring)
        return out.contiguous(), None
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        attention_mask = BatchMask(None, query.shape[2], causal)
        if causal and sliding_window is not None and key.shape[2] > sliding_window:
            attention_mask = band_mask(query.shape[2], key.shape[2], sliding_window, query.device)

    if isinstance(attention_mask, torch.Tensor):
        out = masked_attention(query, key, value, attention_mask, scoring=scoring).transpose(1, 2)
    elif not attention_mask.is_padded:
        out = batched_attention(query, key, value, attention_mask.causal, scoring=scoring).transpose(1, 2)
    elif query.shape[2] == key.shape[2]:
        out = _unpadded(query, key, value, attention_mask, scoring)
    else:
        mask = attention_mask.dense.to(query.device)  # a model spread over devices: layers may be elsewhere
        out = masked_attention(query, key, value, mask, scoring=scoring).transpose(1, 2)
    return out.contiguous(), None


def _of_known_lengths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BatchMask, scoring: Scoring
) -> torch.Tensor:
    """(batch, length, heads, head_dim): packed sequences, or one query for each row of a cache."""
    assert mask.known is not None
    lengths = mask.known
    if lengths.sequence is None:
        scoring = replace(scoring, dropout=0.0)  # nothing learns behind a cache
        return _cached(query, key, value, mask, scoring).transpose(1, 2)
    attend = partial(
        packed_attention,
        sequence_lengths=lengths.sequence,
        causal=mask.causal,
        key_lengths=lengths.key,
        window=mask.window,
        scoring=scoring,
    )
    if lengths.group is not None:
        query, key, value = autocast(query, key, value)  # before they are sent
        return split_attention(query, key, value, lengths.group, attend)
    out = attend(*map(_token_rows, (query, key, value)))
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _cached(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BatchMask, scoring: Scoring
) -> torch.Tensor:
    assert mask.known is not None
    assert mask.known.key is not None
    if mask.window is None:
        return cached_attention(query, key, value, mask.known.key, scoring=scoring)
    starts = [max(0, length - mask.window) for length in mask.known.key]
    valid, hidden = (lengths_mask(lengths, key.shape[2], query.device) for lengths in (mask.known.key, starts))
    return masked_attention(query, key, value, valid & ~hidden, scoring=scoring)


def _unpadded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BatchMask, scoring: Scoring
) -> torch.Tensor:
    """Packs the real tokens, attends, and puts the results back; padding gives zeros."""
    batch, _, length, _ = query.shape
    positions = mask.positions.to(query.device)
    q, k, v = (_token_rows(tensor).index_select(0, positions) for tensor in (query, key, value))
    out = packed_attention(q, k, v, mask.lengths, mask.causal, scoring=scoring)
    rows = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, positions, out)
    return rows.unflatten(0, (batch, length))  # (batch, length, heads, head_dim)


def _token_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).flatten(0, 1)  # (batch × length, heads, head_dim)
