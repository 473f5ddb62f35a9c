"""Attention on Ascend NPUs, by the operators of `torch_npu`.

Source: the operators' documentation in the torch-npu 2.13.0 wheel (`torch_npu/_op_plugin_docs.py`). What this file, and
no other, has to know:

- Their masks are True where a query may NOT attend: the reverse of torch's.
- Without a mask, `sparse_mode` and the token limits are ignored and attention is full, silently. So a causal call
  always carries the mask: one upper triangle of 2048×2048 that stands for every length ("compressed"), made once per
  device.
- `sparse_mode` 3 is causal aligned at the end, 4 a band, 1 takes the mask as it is; the
  default, 0, is full attention without a mask, and the mask as it is with one.
- Lengths of packed sequences ("TND") are cumulative, without the leading 0, and integers on the host.
- `keep_prob` is one minus the dropout probability.
- `npu_fusion_attention` is the training operator. Inference has its own, `npu_fused_infer_attention_score` (one
  operator for prompts and for single tokens behind a cache, which covers `npu_prompt_flash_attention` and
  `npu_incre_flash_attention`): half precision, head dimensions that are multiples of 16, no gradients. It packs only
  under narrow conditions (equal head counts, head dimension 192), so packed sequences take the training operator.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from llava_npu.ops.attention.lengths import Lengths
from llava_npu.ops.planned import Session, npu_operators, planning_session

_COMPRESSED = 2048
_MASK_AS_GIVEN, _CAUSAL_ALIGNED_AT_END, _BAND = 1, 3, 4


def packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    if not any(lengths.query):
        return query.new_zeros(0, query.shape[1], value.shape[-1])
    options: dict[str, Any] = _causal_options(query.device) if causal else {}
    if window is not None:
        options |= {"sparse_mode": _BAND, "pre_tockens": window - 1, "next_tockens": 0}
    occupied = lengths.without_empty()
    return _fusion_attention(
        query,
        key,
        value,
        "TND",
        scale,
        dropout,
        actual_seq_qlen=list(occupied.cumulative_query),
        actual_seq_kvlen=list(occupied.cumulative_key),
        **options,
    )


def batched(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float, dropout: float
) -> torch.Tensor:
    # A single query behind a cache sees every key: no mask.
    options = _causal_options(query.device) if causal and query.shape[2] > 1 else {}
    if _is_inference(query, key, value, dropout):
        return _infer_attention(query, key, value, scale, **options)
    return _fusion_attention(query, key, value, "BNSD", scale, dropout, **options)


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, dropout: float
) -> torch.Tensor:
    batch, heads, query_length, key_length = query.shape[0], mask.shape[1], query.shape[2], key.shape[2]
    hidden = (~mask).expand(batch, heads, query_length, key_length).contiguous()
    if heads == 1 and _is_inference(query, key, value, dropout):
        return _infer_attention(query, key, value, scale, atten_mask=hidden)
    return _fusion_attention(query, key, value, "BNSD", scale, dropout, atten_mask=hidden, sparse_mode=_MASK_AS_GIVEN)


def _fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: str,
    scale: float,
    dropout: float,
    **options: Any,
) -> torch.Tensor:
    out: torch.Tensor = npu_operators().npu_fusion_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        query.shape[1],
        layout,
        scale=scale,
        keep_prob=1.0 - dropout,
        **options,
    )[0]
    return out


def _infer_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, **options: Any
) -> torch.Tensor:
    out: torch.Tensor = npu_operators().npu_fused_infer_attention_score(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        input_layout="BNSD",
        scale=scale,
        **options,
    )[0]
    return out


def _is_inference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return (
        not needs_gradient
        and dropout == 0
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 512
        and query.shape[-1] % 16 == 0
        and query.shape[1] // key.shape[1] <= 64
    )


def _causal_options(device: torch.device) -> dict[str, Any]:
    mask = _compressed_causal_mask(device, planning_session())
    return {"atten_mask": mask, "sparse_mode": _CAUSAL_ALIGNED_AT_END}


@functools.lru_cache(maxsize=32)
def _compressed_causal_mask(device: torch.device, session: Session | None) -> torch.Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be saved for a later backward pass
        return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu_(1)
