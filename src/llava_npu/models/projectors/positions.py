"""The fixed two-dimensional sine-cosine position table of MAE (He et al. 2021, arXiv:2111.06377)."""

from __future__ import annotations

import torch
from torch.nn import functional

from llava_npu.models.projectors.grid import Grid


def sincos_table(side: int, channels: int) -> torch.Tensor:
    """Positions of a side×side grid: (side², channels), float32, on the CPU, which knows float64.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, of the
    coordinate times 10000^(−i/quarter), i < quarter = channels/4. `channels` must be a multiple of 4.
    """
    quarter = channels // 4
    # Counted in integers: DeepSpeed's ZeRO-3 construction casts what floating-point factories return.
    frequencies = 10000.0 ** (-torch.arange(quarter, device="cpu").double() / quarter)
    angles = torch.arange(side, device="cpu").double()[:, None] * frequencies  # (side, quarter)
    codes = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (side, channels/2)
    columns = codes.repeat(side, 1)  # (side², channels/2)
    rows = codes.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)


def resize_table(table: torch.Tensor, side: int, grid: Grid) -> torch.Tensor:
    """Bicubic interpolation of a (side², channels) table to a grid: (height·width, channels), float32 or float64."""
    if table.dtype in (torch.bfloat16, torch.float16):
        table = table.float()
    if grid == (side, side):
        return table
    as_map = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, channels, side, side)
    resized = functional.interpolate(as_map, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).squeeze(0).T
