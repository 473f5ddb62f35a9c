"""The gated activation of Llama's feed-forward layers, of two tensors or of one that holds both.

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


def swiglu_of_halves(joined: torch.Tensor) -> torch.Tensor:
    """silu(gate) · value of a tensor that holds both, as the `gate_up_proj` of Phi-3 and GLM-4 gives them.

    Args:
        joined: (..., 2 × intermediate_size), the gate first.
    """
    return kernels.find("swiglu_of_halves", joined, formula_of_halves)(joined)


def formula_of_halves(joined: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    return formula(*joined.chunk(2, dim=-1))


def formula(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    return torch.nn.functional.silu(gate) * value
