"""Attention on Ascend NPUs, by the operators of `torch_npu`.

Sources: the operators' documentation in the torch-npu 2.13.0 wheel (`torch_npu/_op_plugin_docs.py`), the public sources
of op-plugin and ops-transformer, and what users reported; docs/npu.md has them one by one. What this file, and no
other, has to know:

- Their masks are True where a query may NOT attend: the reverse of torch's.
- Without a mask, `sparse_mode` and the token limits are ignored and attention is full, silently. So a causal call
  always carries the mask: one upper triangle of 2048×2048 that stands for every length ("compressed"), made once per
  device.
- `sparse_mode` 3 is causal aligned at the end, 4 a band, 1 takes the mask as it is; the default, 0, is full attention
  without a mask, and the mask as it is with one.
- Lengths of packed sequences ("TND") are cumulative, without the leading 0, and integers on the host. One call takes
  1024 of them.
- `keep_prob` is one minus the dropout probability.
- `npu_fusion_attention` is the training operator. Inference has its own, `npu_fused_infer_attention_score` (one
  operator for prompts and for single tokens behind a cache, which covers `npu_prompt_flash_attention` and
  `npu_incre_flash_attention`): half precision, head dimensions that are multiples of 16, no gradients. It packs only
  under narrow conditions (equal head counts, head dimension 192), so packed sequences take the training operator.
- With one query, the inference operator is reported to attend to masked keys past the 512th
  (vllm-project/vllm-ascend issue 15503). So it gets the number of valid keys there, never a mask; a mask and one query
  go to the training operator.
- The training operator pads a head dimension that is not a multiple of 16 on every call, but not SigLIP's 72 in layout
  BSND where heads are equal in number. transformers' tensors are BSND in memory, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from llava_npu.ops.attention.implementation import AttentionInputs
from llava_npu.ops.attention.lengths import Lengths
from llava_npu.ops.attention.sdpa import lengths_mask
from llava_npu.ops.fake_ops import PlannedKind, npu_operators, planned_kind
from llava_npu.ops.kernels import register

_COMPRESSED = 2048
_MASK_AS_GIVEN, _CAUSAL_ALIGNED_AT_END, _BAND = 1, 3, 4
_MAX_SEQUENCES = 1024
_MAX_WIDTH = 65535  # heads × head dimension of the inference operator in BSND


class NpuAttention:
    """Chooses operator, layout and mask for each call."""

    def packed(self, inputs: AttentionInputs, lengths: Lengths, causal: bool, window: int | None) -> torch.Tensor:
        query = inputs.query
        if not any(lengths.query):
            return query.new_zeros(0, query.shape[1], inputs.value.shape[-1])
        options: dict[str, Any] = _causal_options(query.device) if causal else {}
        if window is not None:
            options |= {"sparse_mode": _BAND, "pre_tockens": window - 1, "next_tockens": 0}
        calls = lengths.without_empty().in_groups(_MAX_SEQUENCES)
        rows = zip(
            query.split([sum(call.query) for call in calls]),
            inputs.key.split([sum(call.key) for call in calls]),
            inputs.value.split([sum(call.key) for call in calls]),
            strict=True,
        )
        outs = [
            _training_operator(
                inputs.with_tensors(*tensors),
                "TND",
                actual_seq_qlen=list(call.cumulative_query),
                actual_seq_kvlen=list(call.cumulative_key),
                **options,
            )
            for call, tensors in zip(calls, rows, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def batched(self, inputs: AttentionInputs, causal: bool) -> torch.Tensor:
        # A single query behind a cache sees every key: no mask.
        options = _causal_options(inputs.query.device) if causal and inputs.query.shape[2] > 1 else {}
        operator = _inference_operator if _is_inference(inputs) else _training_operator
        return _dense(operator, inputs, **options)

    def masked(self, inputs: AttentionInputs, mask: torch.Tensor) -> torch.Tensor:
        batch, _, query_length, _ = inputs.query.shape
        heads, key_length = mask.shape[1], inputs.key.shape[2]
        hidden = (~mask).expand(batch, heads, query_length, key_length).contiguous()
        if heads == 1 and query_length > 1 and _is_inference(inputs):
            return _dense(_inference_operator, inputs, atten_mask=hidden)
        return _dense(_training_operator, inputs, atten_mask=hidden, sparse_mode=_MASK_AS_GIVEN)

    def cached(self, inputs: AttentionInputs, key_lengths: Sequence[int]) -> torch.Tensor:
        # The whole cache, as it lies: what is beyond a sequence's length is not read, and nothing is copied.
        if _is_inference(inputs):
            return _inference_operator(inputs, "BNSD", actual_seq_lengths_kv=list(key_lengths))
        return self.masked(inputs, lengths_mask(key_lengths, inputs.key.shape[2], inputs.query.device))


register("attention", "npu")(NpuAttention())


def _dense(operator: Any, inputs: AttentionInputs, **options: Any) -> torch.Tensor:
    """Calls an operator in the layout that costs less; in and out (batch, heads, length, head_dim)."""
    if not _is_cheaper_as_bsnd(inputs):
        return operator(inputs, "BNSD", **options)
    tensors = (tensor.transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))
    return operator(inputs.with_tensors(*tensors), "BSND", **options).transpose(1, 2)


def _is_cheaper_as_bsnd(inputs: AttentionInputs) -> bool:
    query, key = inputs.query, inputs.key
    if query.shape[1] * query.shape[3] >= _MAX_WIDTH:
        return False
    if query.shape[-1] % 16 and query.shape[1] == key.shape[1]:
        return True
    tensors = (query, key, inputs.value)
    copied_as_bsnd = sum(tensor.numel() for tensor in tensors if not tensor.transpose(1, 2).is_contiguous())
    copied_as_bnsd = sum(tensor.numel() for tensor in tensors if not tensor.is_contiguous())
    # Whoever called joins the heads next, which is a copy for what comes as BNSD.
    return copied_as_bsnd < copied_as_bnsd + (query.numel() if query.shape[2] > 1 else 0)


def _training_operator(inputs: AttentionInputs, layout: str, **options: Any) -> torch.Tensor:
    out: torch.Tensor = npu_operators().npu_fusion_attention(
        inputs.query.contiguous(),
        inputs.key.contiguous(),
        inputs.value.contiguous(),
        inputs.query.shape[2 if layout == "BSND" else 1],
        layout,
        scale=inputs.scale,
        keep_prob=1.0 - inputs.dropout,
        **options,
    )[0]
    return out


def _inference_operator(inputs: AttentionInputs, layout: str, **options: Any) -> torch.Tensor:
    heads_dim = 2 if layout == "BSND" else 1
    out: torch.Tensor = npu_operators().npu_fused_infer_attention_score(
        inputs.query.contiguous(),
        inputs.key.contiguous(),
        inputs.value.contiguous(),
        num_heads=inputs.query.shape[heads_dim],
        num_key_value_heads=inputs.key.shape[heads_dim],
        input_layout=layout,
        scale=inputs.scale,
        **options,
    )[0]
    return out


def _is_inference(inputs: AttentionInputs) -> bool:
    query, key, value = inputs.query, inputs.key, inputs.value
    return (
        not inputs.learns
        and inputs.dropout == 0
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 512
        and query.shape[-1] % 16 == 0
        and query.shape[1] // key.shape[1] <= 64
    )


def _causal_options(device: torch.device) -> dict[str, Any]:
    return {"atten_mask": _compressed_causal_mask(device, planned_kind()), "sparse_mode": _CAUSAL_ALIGNED_AT_END}


@functools.lru_cache(maxsize=32)
def _compressed_causal_mask(device: torch.device, planned: PlannedKind | None) -> torch.Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be saved for a later backward pass
        return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu_(1)
