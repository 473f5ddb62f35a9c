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


@register("offset_rms_norm", "npu")
def offset_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    if hidden.dtype not in (torch.float32, *_HALF):
        return norm.offset_formula(hidden, weight, epsilon)
    out: torch.Tensor = npu_operators().npu_rms_norm(hidden, 1 + weight.float(), epsilon)[0]
    return out


@register("rotary", "npu")
def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if not all(_rotary_takes(tensor, heads_dim) for tensor in (query, key)):
        return rotary.formula(query, key, cos, sin, heads_dim)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


@register("neighbour_rotary", "npu")
def apply_neighbour_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # In this mode the operator takes angles that all sequences share, and fewer than 1000 sequences × heads.
    takes = all(
        _rotary_takes(tensor, heads_dim) and tensor.shape[0] * tensor.shape[heads_dim] < _MAX_BATCH
        for tensor in (query, key)
    )
    if not takes or cos.shape[0] != 1:
        return rotary.neighbour_formula(query, key, cos, sin, heads_dim)
    return _rotate(query, cos, sin, "interleave"), _rotate(key, cos, sin, "interleave")


def _rotate(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str = "half") -> torch.Tensor:
    # Under autocast the angles come in float32 and the projections in half precision; the operator takes one type.
    angles = (cos.to(tensor.dtype), sin.to(tensor.dtype))
    out: torch.Tensor = npu_operators().npu_rotary_mul(
        tensor, *angles, **({} if mode == "half" else {"rotary_mode": mode})
    )
    return out


def _rotary_takes(tensor: torch.Tensor, heads_dim: int) -> bool:
    return (
        tensor.dtype in (torch.float32, *_HALF)
        and tensor.shape[-1] % 2 == 0
        and tensor.shape[-1] < _MAX_HEAD_DIM
        and max(tensor.shape[0], tensor.shape[heads_dim]) < _MAX_BATCH
    )


@register("swiglu_of_halves", "npu")
def swiglu_of_halves(joined: torch.Tensor) -> torch.Tensor:
    if joined.dtype.itemsize > 4:  # the operator takes no float64
        return gate.formula_of_halves(joined)
    out: torch.Tensor = npu_operators().npu_swiglu(joined, -1)
    return out


@register("swiglu", "npu")
def swiglu(gated: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # Gate and value in one tensor: concatenated for it, as the projections stay two layers (adapters and checkpoints
    # know them as two).
    return swiglu_of_halves(torch.cat((gated, value), dim=-1))
