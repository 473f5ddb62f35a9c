"""Operations at the sizes that models compute, where kernels take other paths than for a few tokens.

Lengths, head counts and dimensions are those of CLIP-L at 336 pixels (577 tokens, 16 heads of 64), SigLIP so400m (729
tokens, 16 heads of 72), and language models with grouped heads of 128 (Llama-3, Qwen2.5), with fewer heads, so that the
float64 formula takes seconds. Caches are longer than what is valid in them, as the engine's are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from llava_npu.diagnostics.operations import (
    Operation,
    Tensors,
    attention,
    attention_inputs,
    batched_on,
    gated,
    masked,
    normed,
    packed,
    random_tensor,
)
from llava_npu.models.projectors.attention import CrossAttention
from llava_npu.ops.attention import cached_attention

_LANGUAGE = (4, 2, 128)  # heads of queries, of keys, and their dimension
_LONG = (2, 1, 128)  # for thousands of tokens: as long as a mask of 2,048 × 2,048 has to stand for more than itself
_CACHE = 4096
_PACK = tuple(1 + number * 7 % 23 for number in range(200))  # 200 sequences of 1 to 23 tokens


def real_sizes() -> Iterator[Operation]:
    """All cases."""
    yield batched_on("CLIP-L, 577 × 64", attention_inputs(577, 577, (4, 4, 64)), False, False)
    yield batched_on("SigLIP, 729 × 72", attention_inputs(729, 729, (4, 4, 72)), False, False)
    yield batched_on("SigLIP, trained", attention_inputs(729, 729, (2, 2, 72), batch=1), False, True)
    yield batched_on("prompt of 2,100", attention_inputs(2100, 2100, _LONG, batch=1), True, False)
    yield batched_on("2,100 causal, trained", attention_inputs(2100, 2100, _LONG, batch=1), True, True)
    yield batched_on("300 behind 2,400", attention_inputs(300, 2700, _LANGUAGE, batch=1), True, False)
    for key_lengths in ((700,), (1500,), (3000,), (700, 3000, 1500)):
        yield _cached(key_lengths)
    yield _padded("padded batch, trained", 700, training=True)
    yield _padded("padded, one query", 1, training=False)
    yield packed("2,100 and 300 tokens", (2100, 300), _LONG, causal=True)
    yield packed("200 sequences", _PACK, _LANGUAGE, causal=True)
    # More than the NPU's operator takes at once.
    yield replace(packed("1,100 sequences", (1, 2) * 550, _LONG, causal=True), differentiable=False)
    yield packed("window of 512", (1300, 400), _LONG, causal=True, window=512)
    yield _cross_attention("Resampler, 144 on 576", queries=144, keys=576, batch=2, shared_queries=True)
    yield _cross_attention("TokenPacker, 288 × 4", queries=1, keys=4, batch=288, shared_queries=False)
    yield normed("4,096 channels", 1, 600, 4096)
    yield gated("11,008 channels", 1, 300, 11008)


def _cached(key_lengths: tuple[int, ...]) -> Operation:
    inputs = attention_inputs(1, _CACHE, _LANGUAGE, batch=len(key_lengths))
    valid = torch.arange(_CACHE) < torch.tensor(key_lengths)[:, None, None, None]
    return Operation(
        "cached_attention",
        f"{', '.join(f'{length:,}' for length in key_lengths)} keys",
        inputs,
        lambda x: cached_attention(x["query"], x["key"], x["value"], key_lengths),
        lambda x: attention(x["query"], x["key"], x["value"], valid),
        differentiable=False,
    )


def _padded(case: str, length: int, training: bool) -> Operation:
    """Two sequences of 700 and 1,100 tokens, padded on the left as a batch of prompts is; the last `length` queries."""
    keys = 700 if training else 1100
    real = torch.arange(keys) >= torch.tensor([0, 300])[:, None, None, None]
    causal = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    return masked(case, attention_inputs(length, keys, _LANGUAGE), causal & real, training)


def _cross_attention(case: str, queries: int, keys: int, batch: int, shared_queries: bool) -> Operation:
    """The attention of Resampler and TokenPacker, heads of 128, compared with torch's `nn.MultiheadAttention`."""
    width, heads = 512, 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(width, heads)
        weights = {name: 2 * value.detach().double() for name, value in module.named_parameters()}

    def compute(x: Tensors) -> torch.Tensor:
        module, arguments = CrossAttention(width, heads).to(x["key"]), (x["query"], x["key"], x["value"])
        out: torch.Tensor = torch.func.functional_call(module, {name: x[name] for name in weights}, arguments)
        return out

    def reference(x: Tensors) -> torch.Tensor:
        module = nn.MultiheadAttention(width, heads, batch_first=True).double()
        arguments = (x["query"].expand(batch, -1, -1), x["key"], x["value"])
        parameters, options = {name: x[name] for name in weights}, {"need_weights": False}
        out: torch.Tensor = torch.func.functional_call(module, parameters, arguments, options)[0]
        return out

    inputs = {
        "query": random_tensor(1 if shared_queries else batch, queries, width),
        "key": random_tensor(batch, keys, width, seed=1),
        "value": random_tensor(batch, keys, width, seed=2),
    }
    return Operation("CrossAttention", case, {**inputs, **weights}, compute, reference)
