"""Calls that real hardware refuses, or computes otherwise than meant, are refused, and the message says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch_npu.fused import RejectedCallError

from tests.simulated_npu.attention_cases import compressed_mask

UNLIMITED = 2147483647


def npu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="npu")


def mask(*shape: int) -> torch.Tensor:
    return npu(*shape, dtype=torch.bool)


def train(
    q: torch.Tensor | None = None, kv: torch.Tensor | None = None, heads: int = 4, layout: str = "BSND", **options: Any
) -> Any:
    """A good call of npu_fusion_attention unless told otherwise."""
    q = npu(2, 6, 4, 8) if q is None else q
    kv = q if kv is None else kv
    return torch_npu.npu_fusion_attention(q, kv, kv, heads, layout, **options)


def packed(ends: Any = (2, 6), kv_ends: Any = None, **options: Any) -> Any:
    q = npu(6, 4, 8)
    return torch_npu.npu_fusion_attention(
        q, q, q, 4, "TND", actual_seq_qlen=ends, actual_seq_kvlen=ends if kv_ends is None else kv_ends, **options
    )


TRAINING: dict[str, tuple[Callable[[], Any], str]] = {
    "double": (lambda: train(npu(2, 6, 4, 8, dtype=torch.float64)), "dtype must be one of"),
    "two dtypes": (lambda: train(kv=npu(2, 6, 4, 8, dtype=torch.half)), "dtypes must be equal"),
    "on the CPU": (lambda: train(torch.zeros(2, 6, 4, 8)), "query must be an NPU tensor"),
    "mask on the CPU": (lambda: train(atten_mask=torch.zeros(6, 6) > 0), "atten_mask must be an NPU tensor"),
    "unknown layout": (lambda: train(layout="BHSD"), "input_layout must be one of"),
    "rank for layout": (lambda: train(npu(2, 6, 32)), r"query \(2, 6, 32\) does not fit layout BSND"),
    "layout of other heads": (lambda: train(layout="BNSD"), "head_num is 4, query has 6 heads"),
    "head_num": (lambda: train(heads=2), "head_num is 2, query has 4 heads"),
    "heads do not divide": (lambda: train(npu(2, 6, 30), layout="BSH"), "head_num 4 does not divide"),
    "grouped heads": (lambda: train(kv=npu(2, 6, 3, 8)), "4 heads must be a multiple of key's 3"),
    "too many heads": (lambda: train(npu(1, 1, 300, 8), heads=300), "head_num must be 1 to 256"),
    "head size": (lambda: train(npu(1, 1, 1, 1024), heads=1), "head size must be 1 to 768"),
    "head sizes differ": (lambda: train(kv=npu(2, 6, 4, 16)), "head sizes must be query = key >= value"),
    "batches differ": (lambda: train(kv=npu(1, 6, 4, 8)), "batch of query is 2, of key 1"),
    "keep_prob of 0": (lambda: train(keep_prob=0.0), "keep_prob is the probability to keep"),
    "float mask": (lambda: train(atten_mask=npu(6, 6)), "atten_mask must be bool or uint8"),
    "mask of 3 axes": (lambda: train(atten_mask=mask(2, 6, 6)), r"atten_mask \(2, 6, 6\) is none of"),
    "mask per head only": (lambda: train(atten_mask=mask(1, 4, 6, 6)), "is none of"),
    "mask of other lengths": (lambda: train(atten_mask=mask(6, 5)), r"atten_mask \(6, 5\) is none of"),
    "uint8 mask of 255": (
        lambda: train(atten_mask=torch.full((6, 6), 255, dtype=torch.uint8, device="npu"), sparse_mode=1),
        "0 \\(keep\\) and 1 \\(mask\\) only",
    ),
    "causal without mask": (lambda: train(sparse_mode=3), "would compute full attention"),
    "next_tockens without mask": (lambda: train(next_tockens=0), "would compute full attention"),
    "pre_tockens without mask": (lambda: train(pre_tockens=100), "would compute full attention"),
    "mask of a wrong size": (lambda: train(atten_mask=mask(6, 6), sparse_mode=2), "takes the compressed mask"),
    "inverted mask": (lambda: train(atten_mask=~compressed_mask(), sparse_mode=3), "strictly above the diagonal"),
    "empty compressed mask": (
        lambda: train(atten_mask=mask(2048, 2048), sparse_mode=2),
        "strictly above the diagonal",
    ),
    "mask against band": (lambda: train(atten_mask=mask(6, 6), next_tockens=0), "keeps positions that"),
    "whole row masked": (lambda: train(atten_mask=~mask(6, 6), sparse_mode=1), "masks a whole row"),
    "sparse_mode 6": (lambda: train(atten_mask=mask(6, 6), sparse_mode=6), "sparse_mode 6 is not simulated"),
    "sparse_mode 12": (lambda: train(sparse_mode=12), "sparse_mode must be 0 to 8"),
    "pse": (lambda: train(pse=npu(2, 4, 6, 6)), "pse is not simulated"),
    "padding_mask": (lambda: train(padding_mask=mask(6, 6)), "padding_mask is not simulated"),
    "lengths of a dense call": (lambda: train(actual_seq_qlen=[6], actual_seq_kvlen=[6]), "are for layout TND"),
    "TND without lengths": (lambda: train(npu(6, 4, 8), layout="TND"), "needs actual_seq_qlen"),
    "lengths on the device": (lambda: packed(torch.tensor([2, 6], device="npu")), "list of int on the host"),
    "lengths in a CPU tensor": (lambda: packed(torch.tensor([2, 6])), "list of int on the host"),
    "a list of tensors": (lambda: packed(list(torch.tensor([2, 6]))), "list of int on the host"),
    "leading zero": (lambda: packed([0, 2, 6]), "without a leading 0"),
    "not cumulative": (lambda: packed([4, 2, 6]), "must be cumulative"),
    "tokens left over": (lambda: packed([2, 5]), "ends at 5, the tensor has 6 tokens"),
    "tokens missing": (lambda: packed([2, 8]), "ends at 8, the tensor has 6 tokens"),
    "unequal sequence counts": (lambda: packed([2, 6], [6]), "must be equally long"),
    "queries without keys": (lambda: packed([2, 6], [0, 6]), "without a leading 0"),
    "queries without keys later": (lambda: packed([2, 4, 6], [2, 2, 6]), "2 queries has no keys"),
    "unlike sequences left out": (lambda: packed([6, 0], [2, 6]), "leave out other sequences"),
    "more sequences than fit": (lambda: packed([1] * 1024 + [6]), "at most 1024 sequences"),
    "TND with a 4-d mask": (lambda: packed(atten_mask=mask(1, 1, 4, 4)), "with TND, atten_mask must have shape"),
    "more queries than keys": (
        lambda: packed([4, 6], [2, 6], atten_mask=compressed_mask(), sparse_mode=3),
        "4 queries on 2 keys masks whole rows",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), TRAINING.values(), ids=TRAINING)
def test_fusion_attention(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RejectedCallError, match=message):
        wrong()


def test_the_calls_that_the_wrong_ones_vary_are_right() -> None:
    train()
    train(npu(2, 6, 32), layout="BSH")
    packed()


def test_arguments_that_do_not_exist_are_refused_by_torch_itself() -> None:
    with pytest.raises(RuntimeError, match="next_tokens"):
        train(next_tokens=0)  # npu_fusion_attention spells it next_tockens
    with pytest.raises(RuntimeError, match="positional"):
        torch_npu.npu_prompt_flash_attention(*[npu(1, 4, 8, dtype=torch.half)] * 3, None)


HALF = torch.half


def prompt(q: torch.Tensor | None = None, kv: torch.Tensor | None = None, **options: Any) -> Any:
    q = npu(2, 6, 4, 16, dtype=HALF) if q is None else q
    kv = q if kv is None else kv
    options = {"num_heads": 4, "input_layout": "BSND", "next_tokens": UNLIMITED} | options
    return torch_npu.npu_prompt_flash_attention(q, kv, kv, **options)


def incremental(q: torch.Tensor | None = None, **options: Any) -> Any:
    q = npu(2, 1, 4, 16, dtype=HALF) if q is None else q
    kv = npu(2, 6, 4, 16, dtype=HALF)
    return torch_npu.npu_incre_flash_attention(q, kv, kv, **({"num_heads": 4, "input_layout": "BSND"} | options))


def infer(q: torch.Tensor | None = None, kv: torch.Tensor | None = None, **options: Any) -> Any:
    q = npu(2, 6, 4, 16, dtype=HALF) if q is None else q
    kv = q if kv is None else kv
    return torch_npu.npu_fused_infer_attention_score(q, kv, kv, **({"num_heads": 4, "input_layout": "BSND"} | options))


ONE = (2, 1, 4, 16)

INFERENCE: dict[str, tuple[Callable[[], Any], str]] = {
    "float32": (lambda: prompt(npu(2, 6, 4, 16)), "dtype must be one of"),
    "a gradient": (lambda: prompt(npu(2, 6, 4, 16, dtype=HALF).requires_grad_()), "has no gradient"),
    "full by accident": (lambda: prompt(next_tokens=0), "every position attends to every other"),
    "prompt: causal without mask": (lambda: prompt(sparse_mode=3), "sparse_mode=3 needs atten_mask"),
    "prompt: default band": (
        lambda: prompt(atten_mask=mask(2, 1, 6, 6), next_tokens=0),
        "keeps positions that",
    ),
    "prompt: inverted mask": (
        lambda: prompt(atten_mask=~compressed_mask(), sparse_mode=3),
        "strictly above the diagonal",
    ),
    "prompt: float mask": (lambda: prompt(atten_mask=npu(6, 6)), "atten_mask must be bool, int8 or uint8"),
    "prompt: heads left at 1": (lambda: prompt(num_heads=1), "num_heads is 1, query has 4"),
    "prompt: key heads": (lambda: prompt(num_key_value_heads=2), "num_key_value_heads is 2, key has 4"),
    "prompt: no multiple": (lambda: prompt(num_key_value_heads=3), "must be a multiple"),
    "prompt: group of 128": (
        lambda: prompt(npu(1, 2, 128, 16, dtype=HALF), npu(1, 2, 1, 16, dtype=HALF), num_heads=128,
                       num_key_value_heads=1),
        "at most 64 times",
    ),
    "prompt: not contiguous": (
        lambda: prompt(npu(2, 4, 6, 16, dtype=HALF).transpose(1, 2)),
        "query must be contiguous",
    ),
    "prompt: TND": (lambda: prompt(npu(6, 4, 16, dtype=HALF), input_layout="TND"), "layout TND is not simulated"),
    "prompt: too long": (lambda: prompt(actual_seq_lengths=[7, 6]), "actual_seq_lengths must be 0 to 6"),
    "prompt: lengths on device": (
        lambda: prompt(actual_seq_lengths=torch.tensor([6, 6], device="npu")),
        "list of int on the host",
    ),
    "prompt: quantised": (lambda: prompt(quant_scale1=npu(1)), "quant_scale1 is not simulated"),
    "incremental: two queries": (
        lambda: incremental(npu(2, 2, 4, 16, dtype=HALF)),
        "one query per sequence, got 2",
    ),
    "incremental: mask of (1, 1, 6)": (lambda: incremental(atten_mask=mask(1, 1, 6)), "is none of"),
    "incremental: paged": (
        lambda: incremental(block_table=npu(2, 1, dtype=torch.int32)),
        "block_table is not simulated",
    ),
    "incremental: padding alone": (
        lambda: incremental(kv_padding_size=npu(1, dtype=torch.int64)),
        "no effect without actual_seq_lengths",
    ),
    "incremental: everything masked": (lambda: incremental(actual_seq_lengths=[0, 6]), "every key of a sequence"),
    "infer: causal without mask": (lambda: infer(sparse_mode=2), "sparse_mode=2 needs atten_mask"),
    "infer: band without mask": (lambda: infer(next_tokens=0), "are ignored"),
    "infer: head size 8": (lambda: infer(npu(2, 6, 4, 8, dtype=HALF)), "multiple of 16"),
    "infer: causal decode": (
        lambda: infer(npu(*ONE, dtype=HALF), npu(2, 6, 4, 16, dtype=HALF), atten_mask=compressed_mask(),
                      sparse_mode=3),
        "have no effect",
    ),
    "infer: whole row masked": (lambda: infer(atten_mask=~mask(2, 1, 6, 6), sparse_mode=1), "whole row is masked"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), INFERENCE.values(), ids=INFERENCE)
def test_inference_attention(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RejectedCallError, match=message):
        wrong()


def test_the_inference_calls_that_the_wrong_ones_vary_are_right() -> None:
    prompt()
    incremental()
    infer()
    with torch.no_grad():
        prompt(npu(2, 6, 4, 16, dtype=HALF).requires_grad_())


SMALL: dict[str, tuple[Callable[[], Any], str]] = {
    "rms: gamma dtype": (
        lambda: torch_npu.npu_rms_norm(npu(2, 8), npu(8, dtype=HALF)),
        "dtypes must be equal",
    ),
    "rms: gamma shape": (lambda: torch_npu.npu_rms_norm(npu(2, 8), npu(4)), "must be the last axes"),
    "rms: one axis": (lambda: torch_npu.npu_rms_norm(npu(8), npu(8)), "takes 2 to 8 dimensions"),
    "rms: on the CPU": (lambda: torch_npu.npu_rms_norm(npu(2, 8), torch.ones(8)), "gamma must be an NPU tensor"),
    "rotary: three axes": (lambda: torch_npu.npu_rotary_mul(npu(6, 4, 8), npu(6, 1, 8), npu(6, 1, 8)), "4 dimensions"),
    "rotary: table dtype": (
        lambda: torch_npu.npu_rotary_mul(npu(2, 4, 6, 8, dtype=HALF), npu(1, 1, 6, 8), npu(1, 1, 6, 8)),
        "dtypes must be equal",
    ),
    "rotary: odd size": (lambda: torch_npu.npu_rotary_mul(npu(2, 4, 6, 7), *[npu(1, 1, 6, 7)] * 2), "must be even"),
    "rotary: large size": (lambda: torch_npu.npu_rotary_mul(npu(1, 1, 1, 896), *[npu(1, 1, 1, 896)] * 2), "below 896"),
    "rotary: table of another layout": (
        lambda: torch_npu.npu_rotary_mul(npu(2, 4, 6, 8), *[npu(1, 4, 6, 8)] * 2),
        "fit no layout",
    ),
    "rotary: half a table": (
        lambda: torch_npu.npu_rotary_mul(npu(2, 4, 6, 8), *[npu(1, 1, 6, 4)] * 2),
        "fit no layout",
    ),
    "rotary: batch table interleaved": (
        lambda: torch_npu.npu_rotary_mul(npu(2, 4, 6, 8), *[npu(2, 1, 6, 8)] * 2, "interleave"),
        "fit no layout",
    ),
    "rotary: mode": (lambda: torch_npu.npu_rotary_mul(npu(2, 4, 6, 8), *[npu(1, 1, 6, 8)] * 2, "quarter"), "half or"),
    "rotary: 1000 sequences": (
        lambda: torch_npu.npu_rotary_mul(npu(1000, 2, 3, 8), *[npu(1, 1, 3, 8)] * 2),
        "too many sequences or heads",
    ),
    "swiglu: odd axis": (lambda: torch_npu.npu_swiglu(npu(2, 7)), "must be even"),
    "swiglu: integers": (lambda: torch_npu.npu_swiglu(npu(2, 8, dtype=torch.int32)), "dtype must be one of"),
    "swiglu: axis out of range": (lambda: torch_npu.npu_swiglu(npu(2, 8), 2), "out of range"),
}


@pytest.mark.parametrize(("wrong", "message"), SMALL.values(), ids=SMALL)
def test_small_operators(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RejectedCallError, match=message):
        wrong()
