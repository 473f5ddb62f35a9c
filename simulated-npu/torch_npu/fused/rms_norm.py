"""`npu_rms_norm`: root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch

from torch_npu.fused._operator import FLOATING, HALF, fused_operator, require, require_dtype, require_npu

NAME = "npu_rms_norm"


@fused_operator("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)", held_outputs=(1,))
def npu_rms_norm(self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises over the axes of `gamma`, the last ones. Returns (output, 1 / root mean square in float32)."""
    require_npu(NAME, self=self, gamma=gamma)
    if gamma.dtype == torch.float32 and self.dtype in HALF:  # aclnnRmsNorm on Atlas A2 and A3
        require_dtype(NAME, HALF, self=self)
    else:
        require_dtype(NAME, FLOATING, self=self, gamma=gamma)
    require(2 <= self.dim() <= 8, NAME, f"takes 2 to 8 dimensions, got {self.dim()}")
    axes = gamma.dim()
    require(
        1 <= axes <= self.dim() and self.shape[-axes:] == gamma.shape,
        NAME,
        f"gamma {tuple(gamma.shape)} must be the last axes of {tuple(self.shape)}",
    )
    wide = self.float()
    rstd = torch.rsqrt(wide.square().mean(dim=tuple(range(-axes, 0)), keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(self.dtype), rstd.detach()
