"""The numbers and formulas of docs/projectors.md, computed from the modules they describe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_npu.errors import UserError
from llava_npu.models import projectors
from llava_npu.models.projectors import Projector, build_projector

PAGE = (Path(__file__).parents[3] / "docs" / "projectors.md").read_text()
ROWS = re.findall(r"^\| \[`(\w+)`\]\((#\w+)\) \| (.+) \|$", PAGE, flags=re.MULTILINE)


def on_meta(type: str, vision: int, text: int, **options: Any) -> Projector:
    with torch.device("meta"):
        return build_projector(type, vision_hidden_size=vision, text_hidden_size=text, **options)


def flops(projector: Projector, grid: tuple[int, int]) -> int:
    features = torch.empty(1, grid[0] * grid[1], projector.input_channels, device="meta")
    with FlopCounterMode(display=False) as counter:
        projector(features, grid)
    return counter.get_total_flops()


def tokens(type: str, grid: tuple[int, int]) -> str:
    try:
        return str(projectors.num_tokens(type, grid, **projectors.grid_defaults(type, grid)))
    except UserError:
        return "not by 2"


def test_every_projector_has_a_row_and_a_section() -> None:
    assert {projectors.registered_name(row[0]) for row in ROWS} == set(projectors.available())
    sections = {re.sub(r"[{}]", "", title).lower() for title in re.findall(r"^### (.+)$", PAGE, flags=re.MULTILINE)}
    assert {row[1].removeprefix("#") for row in ROWS} == sections


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_table(row: tuple[str, str, str]) -> None:
    type, _, cells = row
    projector = on_meta(type, 1024, 4096)
    parameters = sum(parameter.numel() for parameter in projector.parameters())
    cost = flops(projector, (24, 24)) / 1e9
    options = ", ".join(f"`{name}`" for name in projector.options.names()) or "none"
    found = [tokens(type, (24, 24)), tokens(type, (27, 27)), f"{parameters:,}", f"{cost:.1f}"]
    *numbers, documented_options = cells.split(" | ")
    assert numbers == found
    assert sorted(documented_options.split(", ")) == sorted(options.split(", "))


N, V, D = 36, 16, 64
S, Q, H, L, F, T = 16, 9, 24, 3, 20, 4
SVA_N = 144 + 36  # of towers of 12×12 and 6×6 patches, of which queries see blocks of 4×4 and 2×2, or of 2×2 and 1×1


def c_abstractor_block(i: int, h: int, positions: int) -> tuple[int, int]:
    """Parameters and multiply-adds of one residual block."""
    r = i // 4
    parameters = i * h + h * h + 16 * h + 2 * h * r + r
    cost = positions * (i * h + 9 * h + h * h) + 2 * h * r
    return (parameters, cost) if i == h else (parameters + i * h + 2 * h, cost + positions * i * h)


BLOCKS = [c_abstractor_block(V, H, N), c_abstractor_block(H, H, N), *[c_abstractor_block(H, H, Q)] * 2]
FORMULAS: list[tuple[str, dict[str, Any], int, int]] = [
    ("linear", {}, V * D + D, N * V * D),
    ("mlp4x_gelu", {}, V * D + D + 3 * (D * D + D), N * (V * D + 3 * D * D)),
    ("adaptive_pool", {"num_queries": Q}, V * D + D * D + 2 * D, Q * (V * D + D * D)),
    ("pixel_shuffle", {"scale_factor": 3, "depth": 3}, 18 * V + 9 * V * D + D + 2 * (D * D + D),
     4 * (9 * V * D + 2 * D * D)),
    ("patch_merger", {"scale_factor": 3}, 2 * V + 81 * V * V + 9 * V + 9 * V * D + D, 4 * (81 * V * V + 9 * V * D)),
    ("dense_sti", {"layers": [1, 2]}, V * D + D * D + 2 * D, (N + 2 * (N // 8)) * (V * D + D * D)),
    ("dense_sci", {"layers": [1, 2]}, 3 * V * D + D * D + 2 * D, N * (3 * V * D + D * D)),
    ("dense_dci", {"groups": [2, 3, 5]}, 4 * V * D + D * D + 2 * D, N * (4 * V * D + D * D)),
    ("qformer", {"num_queries": Q, "hidden_size": H, "num_layers": 3, "num_heads": 2},
     Q * H + 2 * H + 3 * (12 * H * H + 13 * H) + 2 * (2 * H * H + 2 * V * H + 6 * H) + H * D + D,
     3 * (12 * Q * H * H + 2 * Q * Q * H) + 2 * (2 * Q * H * H + 2 * N * V * H + 2 * Q * N * H) + Q * H * D),
    ("d_abstractor",
     {"hidden_size": H, "num_queries": Q, "num_input_tokens": N, "num_layers": 3, "num_heads": 2, "num_points": 5,
      "feed_forward_size": F},
     V * H + H + N * H + Q * H + 2 * Q + 3 * (6 * H * H + 13 * H + 3 * 10 * (H + 1) + 2 * H * F + F) + H * D + D,
     N * V * H + 3 * (N * H * H + 5 * Q * H * H + 2 * Q * Q * H + 3 * 10 * Q * H + 2 * Q * H * F) + Q * H * D),
    ("sva",
     {"num_queries": Q, "query_groups": [9, 36], "hidden_size": H, "num_layers": 3, "num_heads": 2,
      "tower_sides": [12, 6], "tower_widths": [2, 8]},
     (2 + 8) * H + 2 * (H * H + 4 * H) + 2 * H
     + 3 * (2 * (7 * H * H + 4 * H) + 4 * (2 * H * H + 4 * H) + (16 + 4 + 4) * H) + 2 * H * D + D * D + 2 * D,
     144 * 2 * H + 36 * 8 * H + SVA_N * H * H + 3 * (2 * H * H + 6 * 45 * H * H + 2 * 2 * SVA_N * (H * H + H))
     + Q * (2 * H * D + D * D)),
    ("mqt", {"num_queries": Q, "tokens": T, "num_heads": 2}, Q * V + 4 * V * V + 10 * V + V * D,
     2 * T * V * V + 2 * N * V * V + 2 * T * N * V + T * V * D),
    ("matryoshka_pool", {"tokens": T}, V * D + D * D + 2 * D, N * (V * D + D * D)),
    ("ldp", {}, V * D + D * D + 2 * D + 2 * (D * D + 14 * D + 2 * D * S + S),
     N * (V * D + D * D) + N * (9 * D + D * D) + 9 * (9 * D + D * D) + 4 * D * S),
    ("ldpv2", {"num_queries": Q}, V * D + D * D + 12 * D, N * (V * D + D * D) + Q * 9 * D),
    ("resampler", {"num_queries": Q, "num_heads": 2}, V * D + 5 * D * D + Q * D + 10 * D,
     N * V * D + 2 * N * D * D + 3 * Q * D * D + 2 * Q * N * D),
    ("tokenpacker", {"region_layers": [1, 2, 3]}, (7 + 2 * L) * V * V + 14 * V + V * D + D * D + 2 * D,
     N * (2 * L + 4) * V * V + 3 * 9 * V * V + 2 * N * V + 9 * (V * D + D * D)),
    ("c_abstractor", {"hidden_size": H, "num_queries": Q, "num_input_tokens": N, "depth": 2},
     N * V + sum(block[0] for block in BLOCKS) + H * D + D * D + 2 * D,
     sum(block[1] for block in BLOCKS) + Q * (H * D + D * D)),
]  # fmt: skip


@pytest.mark.parametrize(("type", "options", "parameters", "multiply_adds"), FORMULAS)
def test_formulas(type: str, options: dict[str, Any], parameters: int, multiply_adds: int) -> None:
    projector = on_meta(type, V, D, **options)
    assert sum(parameter.numel() for parameter in projector.parameters()) == parameters
    assert flops(projector, (6, 6)) == 2 * multiply_adds
