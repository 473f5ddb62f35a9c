"""Root-mean-square normalization.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467), as transformers computes it
for Llama: the mean in float32, the weight applied in the input's type. On an Ascend, `torch_npu.npu_rms_norm`, which
applies the weight before it rounds: equal in float32, and within one rounding in half precision.
"""

from __future__ import annotations

import torch

from llava_npu.ops import kernels


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight · hidden / √(mean(hidden²) + epsilon).

    Args:
        hidden: (..., hidden_size).
        weight: (hidden_size,).
    """
    return kernels.find("rms_norm", hidden, formula)(hidden, weight, epsilon)


def offset_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(1 + weight) · hidden / √(mean(hidden²) + epsilon), as Gemma has it; in float32, rounded once.

    Args:
        hidden: (..., hidden_size).
        weight: (hidden_size,).
    """
    return kernels.find("offset_rms_norm", hidden, offset_formula)(hidden, weight, epsilon)


def offset_formula(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """In plain torch."""
    return formula(hidden.float(), 1 + weight.float(), epsilon).to(hidden.dtype)


def formula(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """In plain torch."""
    wide = hidden.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * normalised.to(hidden.dtype)
