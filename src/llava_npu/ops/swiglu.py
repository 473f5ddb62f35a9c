"""The gated activation of Llama's feed-forward layers.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202). On an Ascend, `torch_npu.npu_swiglu`, which
takes gate and value in one tensor: they are concatenated for it, as the projections stay two layers (adapters and
checkpoints know them as two).
"""

from __future__ import annotations

import torch

from llava_npu.ops.planned import kind_of, npu_operators


def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) · value.

    Args:
        gate, value: (..., intermediate_size).
    """
    if kind_of(gate) == "npu" and gate.dtype.itemsize <= 4:  # the operator takes no float64
        out: torch.Tensor = npu_operators().npu_swiglu(torch.cat((gate, value), dim=-1), -1)
        return out
    return torch.nn.functional.silu(gate) * value
