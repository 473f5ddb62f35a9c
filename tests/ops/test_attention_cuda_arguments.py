"""What the CUDA implementation asks of torch's variable-length attention, checked without a GPU.

Reference: float64 eager attention. In place of the kernel stands the documentation of
`torch.nn.attention.varlen.varlen_attn`, as arithmetic; every call is bound to the real function's signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from llava_npu.ops.attention.implementation import AttentionInputs
from llava_npu.ops.attention.lengths import Lengths
from llava_npu.ops.kernels.cuda import attention as cuda
from support.eager_attention import block_diagonal_mask, build_mask, eager

CUDA = cuda.CudaAttention()

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no variable-length attention")
if "scale" not in inspect.signature(varlen.varlen_attn).parameters:
    pytest.skip("this torch's varlen_attn takes no scale: the product does not call it", allow_module_level=True)


def documented_varlen(*args: Any, **kwargs: Any) -> torch.Tensor:
    call = inspect.signature(varlen.varlen_attn).bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    assert a["cu_seq_q"].dtype == a["cu_seq_k"].dtype == torch.int32
    assert a["query"].shape[1] == a["key"].shape[1] or a["enable_gqa"]
    query_ends, key_ends = a["cu_seq_q"].tolist(), a["cu_seq_k"].tolist()
    assert query_ends[0] == key_ends[0] == 0
    before, after = a["window_size"]
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
        assert q1 - q0 <= a["max_q"]
        assert k1 - k0 <= a["max_k"]
        mask = build_mask(
            q1 - q0, k1 - k0, lambda r, c: (before < 0 or c >= r - before) and (after < 0 or c <= r + after)
        )
        parts = (rows.transpose(0, 1)[None] for rows in (a["query"][q0:q1], a["key"][k0:k1], a["value"][k0:k1]))
        outs.append(eager(*parts, mask, a["scale"])[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture(autouse=True)
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return documented_varlen(*args, **kwargs)

    monkeypatch.setattr(cuda, "_varlen_for", lambda *_: counted)
    return calls


def rows(total: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(total, heads, 8, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(
    ("query_lengths", "key_lengths"), [((3, 7, 1), (3, 7, 1)), ((2, 1), (5, 4)), ((2, 2), (6, 6)), ((0, 3), (0, 3))]
)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 2)])
def test_packed(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool, window: int | None) -> None:
    q, k, v = rows(sum(query_lengths), 4, 0), rows(sum(key_lengths), 2, 1), rows(sum(key_lengths), 2, 2)
    may_attend: Callable[[int, int], bool] = lambda r, c: (  # noqa: E731
        (not causal or c <= r) and (window is None or c > r - window)
    )
    mask = block_diagonal_mask(query_lengths, key_lengths, may_attend)
    expected = eager(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask, 0.3)[0]
    out = CUDA.packed(AttentionInputs(q, k, v, 0.3), Lengths(query_lengths, key_lengths), causal, window)
    torch.testing.assert_close(out, expected.transpose(0, 1))


def test_a_piece_of_a_prompt_behind_a_cache_takes_the_kernel(kernel_calls: list[int]) -> None:
    q, k, v = (torch.randn(2, heads, length, 8).double() for heads, length in ((4, 3), (2, 7), (2, 7)))
    out = CUDA.batched(AttentionInputs(q, k, v, 0.3), True)
    torch.testing.assert_close(out, eager(q, k, v, build_mask(3, 7, lambda r, c: c <= r), 0.3))
    assert kernel_calls == [1]


def test_sequences_of_one_length_take_sdpa(kernel_calls: list[int]) -> None:
    q, k, v = rows(6, 4, 0), rows(6, 2, 1), rows(6, 2, 2)
    CUDA.packed(AttentionInputs(q, k, v, 0.3), Lengths((3, 3), (3, 3)), True, None)
    assert kernel_calls == []


def test_boundaries_are_copied_once_for_all_layers() -> None:
    cpu = torch.device("cpu")
    cuda._boundaries.cache_clear()
    with torch.inference_mode():
        first = cuda._boundaries((3, 10, 11), cpu)
    assert not first.is_inference()  # backward could not save it later
    assert first.tolist() == [0, 3, 10, 11]
    assert cuda._boundaries((3, 10, 11), cpu) is first
