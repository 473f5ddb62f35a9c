"""Reference: float64 eager attention on the CPU, forward and gradients (`eager_attention.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llava_npu.ops.attention import Scoring, batched_attention, cached_attention, masked_attention, packed_attention
from llava_npu.ops.kernels.npu import attention as npu_attention
from support.eager_attention import (
    assert_equal_to_eager,
    block_diagonal_mask,
    build_mask,
    eager,
)

HEADS = [(4, 4), (4, 2), (4, 1)]  # multi-head, grouped-query, multi-query
CAUSAL = lambda row, column: column <= row  # noqa: E731
FULL = lambda row, column: True  # noqa: E731


def random(*shape: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def packed_inputs(
    query_lengths: Sequence[int], key_lengths: Sequence[int], heads: tuple[int, int], device: torch.device
) -> list[torch.Tensor]:
    return [
        random(sum(lengths), number, 8, device=device, seed=seed)
        for seed, (lengths, number) in enumerate(
            [(query_lengths, heads[0]), (key_lengths, heads[1]), (key_lengths, heads[1])]
        )
    ]


def check_packed(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    causal: bool,
    device: torch.device,
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
) -> None:
    def may_attend(row: int, column: int) -> bool:
        return (not causal or column <= row) and (window is None or column > row - window)

    mask = block_diagonal_mask(query_lengths, key_lengths, may_attend)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (rows.transpose(0, 1)[None] for rows in (q, k, v))
        return eager(q, k, v, mask)[0].transpose(0, 1)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention(q, k, v, query_lengths, causal, key_lengths=key_lengths, window=window)

    assert_equal_to_eager(packed_inputs(query_lengths, key_lengths, heads, device), ours, reference)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(5,), (3, 7, 1, 4), (4, 4, 4), (0, 3, 0, 2), (1, 1)])
def test_packed(lengths: tuple[int, ...], causal: bool, heads: tuple[int, int], device: torch.device) -> None:
    check_packed(lengths, lengths, causal, device, heads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("query_lengths", "key_lengths"),
    [((2, 1, 3), (5, 4, 3)), ((2, 2), (6, 6)), ((1, 1, 1), (4, 2, 7))],
    ids=["ragged", "uniform", "single-token"],
)
def test_packed_with_cached_keys_is_aligned_at_the_end(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool, device: torch.device
) -> None:
    check_packed(query_lengths, key_lengths, causal, device)


@pytest.mark.parametrize(
    ("query_lengths", "key_lengths", "causal"),
    [((5, 3), (2, 3), True), ((4, 2), (0, 2), True), ((4, 2), (0, 2), False), ((3,), (0,), False)],
    ids=["more-queries-than-keys", "no-keys-causal", "no-keys", "nothing-at-all"],
)
def test_packed_queries_that_see_nothing_give_zeros(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool, device: torch.device
) -> None:
    check_packed(query_lengths, key_lengths, causal, device)


@pytest.mark.parametrize("window", [1, 3, 6, 100])
@pytest.mark.parametrize("lengths", [((6, 2, 9), (6, 2, 9)), ((5, 5), (5, 5)), ((2, 3), (7, 3))])
def test_packed_sliding_window(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], window: int, device: torch.device
) -> None:
    check_packed(*lengths, causal=True, device=device, window=window)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    causal=st.booleans(),
    heads=st.sampled_from(HEADS),
)
def test_packed_any_lengths(lengths: list[tuple[int, int]], causal: bool, heads: tuple[int, int]) -> None:
    query_lengths, key_lengths = zip(*lengths, strict=True)
    assume(any(query_lengths))
    check_packed(query_lengths, key_lengths, causal, torch.device("cpu"), heads)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("query_length", "key_length"), [(5, 5), (1, 6), (3, 7), (6, 4), (3, 0)])
def test_batched(
    query_length: int, key_length: int, causal: bool, heads: tuple[int, int], device: torch.device
) -> None:
    mask = build_mask(query_length, key_length, CAUSAL if causal else FULL)
    inputs = [
        random(2, heads[0], query_length, 8, device=device),
        random(2, heads[1], key_length, 8, device=device, seed=1),
        random(2, heads[1], key_length, 8, device=device, seed=2),
    ]
    assert_equal_to_eager(
        inputs, lambda q, k, v: batched_attention(q, k, v, causal), lambda q, k, v: eager(q, k, v, mask)
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask_heads", [1, 4])
@pytest.mark.parametrize(("query_length", "key_length"), [(4, 6), (1, 6)])
def test_masked_with_rows_that_see_nothing(
    query_length: int, key_length: int, mask_heads: int, heads: tuple[int, int], device: torch.device
) -> None:
    mask = torch.rand(3, mask_heads, query_length, key_length, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[1, :, 0] = False
    inputs = [
        random(3, heads[0], query_length, 8, device=device),
        random(3, heads[1], key_length, 8, device=device, seed=1),
        random(3, heads[1], key_length, 8, device=device, seed=2),
    ]
    on_device = mask.to(device)
    assert_equal_to_eager(
        inputs, lambda q, k, v: masked_attention(q, k, v, on_device), lambda q, k, v: eager(q, k, v, mask)
    )
    assert not masked_attention(inputs[0], inputs[1], inputs[2], on_device)[1, :, 0].any()


def test_scale_and_smaller_value_dimension(device: torch.device) -> None:
    inputs = [random(1, 2, 5, dim, device=device, seed=seed) for seed, dim in enumerate((16, 16, 8))]
    mask = build_mask(5, 5, CAUSAL)
    assert_equal_to_eager(
        inputs,
        lambda q, k, v: batched_attention(q, k, v, True, scoring=Scoring(scale=0.7)),
        lambda q, k, v: eager(q, k, v, mask, scale=0.7),
    )


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize(("query_length", "key_length"), [(6, 6), (1, 6), (2, 6)])
def test_generation_in_half_precision(
    query_length: int, key_length: int, inference_mode: bool, device: torch.device
) -> None:
    """Prompts and cached decoding without gradients: on an Ascend, the inference operators."""
    q = random(2, 4, query_length, 16, device=device, dtype=torch.bfloat16)
    k = random(2, 2, key_length, 16, device=device, dtype=torch.bfloat16, seed=1)
    v = random(2, 2, key_length, 16, device=device, dtype=torch.bfloat16, seed=2)
    padded = build_mask(query_length, key_length, lambda row, column: 2 <= column <= row)[None, None].expand(
        2, -1, -1, -1
    )
    with torch.inference_mode() if inference_mode else torch.no_grad():
        causal = batched_attention(q, k, v, True)
        masked = masked_attention(q, k, v, padded.to(device))
    q, k, v = (tensor.cpu().double() for tensor in (q, k, v))
    expected = eager(q, k, v, build_mask(query_length, key_length, CAUSAL))
    torch.testing.assert_close(causal.cpu().double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(masked.cpu().double(), eager(q, k, v, padded), rtol=2e-2, atol=2e-2)


def test_training_works_after_a_first_use_in_inference_mode(device: torch.device) -> None:
    """What is cached on a device in inference mode must not be an inference tensor: backward could not save it."""
    npu_attention._compressed_causal_mask.cache_clear()
    q, k, v = packed_inputs((11, 13), (11, 13), (4, 2), device)
    with torch.inference_mode():
        packed_attention(q, k, v, (11, 13), True)
        assert not npu_attention._compressed_causal_mask(device, None).is_inference()
    packed_attention(q.requires_grad_(), k, v, (11, 13), True).sum().backward()
    assert q.grad is not None


def test_autocast_takes_inputs_of_mixed_types(device: torch.device) -> None:
    """Under autocast, rotary embeddings leave queries and keys in float32 while values are already bfloat16."""
    q, k, v = packed_inputs((3, 4), (3, 4), (2, 2), device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = packed_attention(q, k, v.bfloat16(), (3, 4), True)
    assert out.dtype == torch.bfloat16
    expected = packed_attention(q, k, v, (3, 4), True)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dropout", [0.25, 0.75])
def test_dropout_drops_weights_with_that_probability(dropout: float, device: torch.device) -> None:
    """With equal scores and values of one, each output is (kept weights)/(1 − dropout): its mean stays one."""
    length, heads = 64, 8
    zeros = torch.zeros(1, heads, length, 8, device=device)
    ones = torch.ones(1, heads, length, 8, device=device)
    torch.manual_seed(0)
    out = batched_attention(zeros, zeros, ones, False, scoring=Scoring(dropout=dropout))[..., 0].cpu()
    # Each output averages 64 Bernoulli draws: variance = dropout / (1 − dropout) / 64.
    assert abs(out.mean().item() - 1) < 0.05
    assert out.var().item() == pytest.approx(dropout / (1 - dropout) / length, rel=0.25)


def test_wrong_arguments_are_named() -> None:
    q, k, v = packed_inputs((3, 4), (3, 4), (4, 2), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sequence_lengths \(3, 3\) add up to 6, but there are 7 tokens"):
        packed_attention(q, k, v, (3, 3), True)
    with pytest.raises(ValueError, match="2 query lengths but 1 key lengths"):
        packed_attention(q, k, v, (3, 4), True, key_lengths=(7,))
    with pytest.raises(ValueError, match="window 2 with causal=False"):
        packed_attention(q, k, v, (3, 4), False, window=2)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        packed_attention(q[:, :3], k, v, (3, 4), True)
    with pytest.raises(ValueError, match=r"torch\.float32; a boolean one is needed"):
        masked_attention(q[None], k[None], v[None], torch.zeros(1, 1, 7, 7))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(9, 700, 3), (700, 700, 700), (0, 5, 1), (0, 0, 0)])
def test_one_query_sees_the_valid_keys_of_a_longer_cache(
    lengths: tuple[int, ...], dtype: torch.dtype, heads: tuple[int, int], device: torch.device
) -> None:
    """The rest of the cache holds large numbers: a single key attended to beyond the length would show."""
    cache_length = 760
    q = random(3, heads[0], 1, 16, device=device, dtype=dtype)
    k, v = (random(3, heads[1], cache_length, 16, device=device, seed=seed, dtype=dtype) for seed in (1, 2))
    for row, length in enumerate(lengths):
        k[row, :, length:] = 100.0
        v[row, :, length:] = 100.0
    with torch.no_grad():
        out = cached_attention(q, k, v, lengths)
    mask = torch.arange(cache_length) < torch.tensor(lengths)[:, None, None, None]
    expected = eager(*(tensor.cpu().double() for tensor in (q, k, v)), mask.expand(-1, 1, 1, -1))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keys", [500, 700])
def test_a_mask_over_one_query_hides_every_masked_key(keys: int, device: torch.device) -> None:
    """As padded batches decode. The NPU's inference operator is reported to attend past key 512 all the same."""
    q, k, v = (random(2, 4, n, 16, device=device, seed=n, dtype=torch.bfloat16) for n in (1, keys, keys))
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., :40] = False  # padded on the left
    mask[1, ..., keys - 90 :] = False  # and on the right
    with torch.no_grad():
        out = masked_attention(q, k, v, mask.to(device))
    expected = eager(*(tensor.cpu().double() for tensor in (q, k, v)), mask)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_more_sequences_than_one_call_takes(device: torch.device) -> None:
    check_packed((1, 2, 0) * 700, (1, 2, 0) * 700, causal=True, device=device)


@pytest.mark.parametrize(
    ("head_dim", "as_in_transformers", "layout"),
    [(72, True, "BSND"), (72, False, "BSND"), (64, True, "BSND"), (64, False, "BNSD")],
)
def test_an_npu_gets_the_layout_that_it_neither_pads_nor_copies(
    head_dim: int, as_in_transformers: bool, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP's 72 is padded in BNSD; transformers' heads come as a view of (batch, length, heads, head_dim)."""
    if device.type != "npu":
        pytest.skip("its operator takes contiguous tensors, in a layout that it is told")
    import torch_npu
    from torch_npu.simulation import count_copied_bytes

    operator, layouts = torch_npu.npu_fusion_attention, []

    def recorded(*arguments: Any, **options: Any) -> Any:
        layouts.append(arguments[4])
        return operator(*arguments, **options)

    monkeypatch.setattr(torch_npu, "npu_fusion_attention", recorded)
    shape = (2, 9, 4, head_dim) if as_in_transformers else (2, 4, 9, head_dim)
    tensors = [random(*shape, device=device, seed=seed) for seed in range(3)]
    heads_first = [tensor.transpose(1, 2) if as_in_transformers else tensor for tensor in tensors]
    with count_copied_bytes() as copied:
        batched_attention(*heads_first, causal=False)
    assert layouts == [layout]
    if head_dim != 72 or as_in_transformers:
        assert copied[0] == 0


def test_cached_attention_names_wrong_lengths() -> None:
    q, k = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 6, 8)
    with pytest.raises(ValueError, match="in a cache of 6 positions"):
        cached_attention(q, k, k, (3, 7))
    with pytest.raises(ValueError, match="one query and one length per sequence"):
        cached_attention(q, k, k, (3,))
