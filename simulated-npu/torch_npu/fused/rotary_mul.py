"""`npu_rotary_mul`: rotary position embedding (Su et al., 2021), given cosines and sines."""

from __future__ import annotations

import torch

from torch_npu.fused._operator import FLOATING, fused_operator, require, require_dtype, require_npu

NAME = "npu_rotary_mul"
MAX_SIZE = 896  # exclusive
MAX_AXIS = 1000  # exclusive, for batch and heads
MAX_BATCH_HEADS_WITH_TABLE_GRADIENT = 1024


@fused_operator(
    "npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
    held_outputs=(),
)
def npu_rotary_mul(
    self: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    """self * r1 + rotated(self) * r2; `self` as BNSD, BSND or SBND, r1 (cosines) and r2 (sines) broadcast to it."""
    require_npu(NAME, self=self, r1=r1, r2=r2, rotate=rotate)
    require_dtype(NAME, FLOATING, self=self, r1=r1, r2=r2)
    require(self.dim() == r1.dim() == r2.dim() == 4, NAME, "all tensors must have 4 dimensions")
    size = self.shape[-1]
    require(size % 2 == 0 and size < MAX_SIZE, NAME, f"head size must be even and below {MAX_SIZE}, got {size}")
    require(rotary_mode in ("half", "interleave"), NAME, f"rotary_mode must be half or interleave, got {rotary_mode!r}")
    require(r1.shape == r2.shape, NAME, f"r1 {tuple(r1.shape)} and r2 {tuple(r2.shape)} must be equal")
    _check_table_shape(self, r1, rotary_mode)

    if rotate is not None:
        require(
            tuple(rotate.shape) == (size, size), NAME, f"rotate must be ({size}, {size}), got {tuple(rotate.shape)}"
        )
        require(not rotate.requires_grad, NAME, "rotate has no gradient")
        rotated = self @ rotate.to(self.dtype)
    elif rotary_mode == "half":
        first, second = self.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    else:
        even, odd = self[..., 0::2], self[..., 1::2]
        rotated = torch.stack((-odd, even), dim=-1).flatten(-2)
    return r1 * self + r2 * rotated


def _check_table_shape(x: torch.Tensor, table: torch.Tensor, mode: str) -> None:
    """The tables have the length's axis, wherever the layout puts it, and may have those of batch and heads."""
    a, b, c, size = x.shape
    per_layout = {  # layout: (batch, heads, shapes of the tables)
        "BNSD": (a, b, [(1, 1, c), (a, 1, c), (a, b, c)]),
        "BSND": (a, c, [(1, b, 1), (a, b, 1), (a, b, c)]),
        "SBND": (b, c, [(a, 1, 1), (a, b, 1), (a, b, c)]),
    }
    fitting = []
    for layout, (batch, heads, shapes) in per_layout.items():
        if mode == "interleave":
            shapes = shapes[:1]
        if tuple(table.shape) in [(*shape, size) for shape in shapes]:
            fitting.append((layout, batch, heads))
    require(bool(fitting), NAME, f"r1 and r2 {tuple(table.shape)} fit no layout of {tuple(x.shape)} in mode {mode}")
    small = [
        layout
        for layout, batch, heads in fitting
        if (batch * heads < MAX_AXIS if mode == "interleave" else max(batch, heads) < MAX_AXIS)
        and not (table.requires_grad and batch * heads > MAX_BATCH_HEADS_WITH_TABLE_GRADIENT)
    ]
    require(bool(small), NAME, f"too many sequences or heads in {tuple(x.shape)} (layout {fitting[0][0]})")
