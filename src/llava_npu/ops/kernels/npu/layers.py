"""RMSNorm, rotary embedding and SwiGLU on Ascend NPUs, by the operators of `torch_npu`."""

from __future__ import annotations

import torch

from llava_npu.ops import rms_norm as norm
from llava_npu.ops import rotary
from llava_npu.ops import swiglu as gate
from llava_npu.ops.fake_ops import npu_operators
from llava_npu.ops.kernels import register

_HALF = (torch.float16, torch.bfloat16)

# The operator's documentation: an even head dimension below 896, fewer than 1000 sequences and heads.
_MAX_HEAD_DIM, _MAX_BATCH = 896, 1000


@register("rms_norm", "npu")
def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    # The operator takes one type, or half precision with a float32 weight (Atlas A2 and A3); no float64.
    one_type = hidden.dtype == weight.dtype and hidden.dtype.itemsize <= 4
    if not one_type and not (hidden.dtype in _HALF and weight.dtype == torch.float32):
        return norm.formula(hidden, weight, epsilon)
    out: torch.Tensor = npu_operators().npu_rms_norm(hidden, weight, epsilon)[0]
    return out.to(torch.promote_types(hidden.dtype, weight.dtype))  # the operator gives the input's type


@register("rotary", "npu")
def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if not all(_rotary_takes(tensor, heads_dim) for tensor in (query, key)):
        return rotary.formula(query, key, cos, sin, heads_dim)
    # Under autocast the angles come in float32 and the projections in half precision; the operator takes one type.
    return (
        npu_operators().npu_rotary_mul(query, cos.to(query.dtype), sin.to(query.dtype)),
        npu_operators().npu_rotary_mul(key, cos.to(key.dtype), sin.to(key.dtype)),
    )


def _rotary_takes(tensor: torch.Tensor, heads_dim: int) -> bool:
    return (
        tensor.dtype in (torch.float32, *_HALF)
        and tensor.shape[-1] % 2 == 0
        and tensor.shape[-1] < _MAX_HEAD_DIM
        and max(tensor.shape[0], tensor.shape[heads_dim]) < _MAX_BATCH
    )


@register("swiglu", "npu")
def swiglu(gated: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if gated.dtype.itemsize > 4:  # the operator takes no float64
        return gate.formula(gated, value)
    # Gate and value in one tensor: concatenated for it, as the projections stay two layers (adapters and checkpoints
    # know them as two).
    out: torch.Tensor = npu_operators().npu_swiglu(torch.cat((gated, value), dim=-1), -1)
    return out
