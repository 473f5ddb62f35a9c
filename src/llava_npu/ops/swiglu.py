"""The gated activation of Llama's feed-forward layers.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202). On an Ascend, `torch_npu.npu_swiglu`.
"""

from __future__ import annotations

import torch

from llava_npu.ops import kernels


def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) · value.

    Args:
        gate, value: (..., intermediate_size).
    """
    return kernels.find("swiglu", gate, formula)(gate, value)


def formula(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    return torch.nn.functional.silu(gate) * value
