"""The fixed two-dimensional sine-cosine position table of MAE (He et al. 2021, arXiv:2111.06377)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from llava_npu.models.projectors.grid import Grid


def sincos_table(side: int, channels: int) -> torch.Tensor:
    """Positions of a side×side grid: (side², channels), float32, on the CPU.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, of the
    coordinate times 10000^(−i/quarter), i < quarter = channels/4. `channels` must be a multiple of 4.

    Computed with NumPy in float32 throughout, as MAE does: the originals' tables have this rounding, 2e-6 at the far
    side of a 20×20 grid. (DeepSpeed's ZeRO-3 construction also leaves NumPy's arrays alone.)
    """
    quarter = channels // 4
    frequencies = 1 / np.float32(10000) ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    angles = np.arange(side, dtype=np.float32)[:, None] * frequencies  # (side, quarter)
    codes = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))  # (side, channels/2)
    columns = codes.repeat(side, 1)  # (side², channels/2)
    rows = codes.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)


def resize_table(table: torch.Tensor, side: int, grid: Grid) -> torch.Tensor:
    """Bicubic interpolation of a (side², channels) table to a grid: (height·width, channels).

    In float32 whatever the table's type, as the originals do; without interpolation the table is returned as it is.
    """
    if grid == (side, side):
        return table
    as_map = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, channels, side, side)
    resized = functional.interpolate(as_map, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).squeeze(0).T
