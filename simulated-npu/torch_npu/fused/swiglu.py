"""`npu_swiglu`: the gate of LLaMA's feed-forward (Shazeer, 2020)."""

from __future__ import annotations

import torch

from torch_npu.fused._operator import FLOATING, fused_operator, require, require_dtype, require_npu

NAME = "npu_swiglu"


@fused_operator("npu_swiglu(Tensor self, int dim=-1) -> Tensor", held_outputs=())
def npu_swiglu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) * second half along `dim`."""
    require_npu(NAME, self=self)
    require_dtype(NAME, FLOATING, self=self)
    require(1 <= self.dim() <= 8, NAME, f"takes 1 to 8 dimensions, got {self.dim()}")
    require(-self.dim() <= dim < self.dim(), NAME, f"dim {dim} is out of range for {self.dim()} dimensions")
    require(self.shape[dim] % 2 == 0, NAME, f"axis {dim} of {tuple(self.shape)} must be even")
    gate, up = self.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * up
