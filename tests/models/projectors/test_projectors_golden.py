"""Numbers of the original implementations (LLaVA-NPU 2024, MobileVLM, OmniLMM, TokenPacker, Honeybee), run in float64.

`tests/golden/projectors.json` was made by executing the originals on weights and inputs that are hashes of their
position (`golden_fill.py`), with the predecessor's parameter names giving the order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_npu.models.checkpoints.projectors import LLAVA_NPU_2024, from_original
from llava_npu.models.projectors import Projector, build_projector
from llava_npu.models.projectors.positions import sincos_table
from support.golden_fill import features, fill, uniform

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "projectors.json").read_text())
WIDTHS = {"clip": (1024, 576), "siglip": (1152, 729)}
TEXT = 4096
# Golden name → type, options, tolerance. The references of the resampler and of TokenPacker compute positions and
# interpolation in float32.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "mlp2x_gelu": ("mlp2x_gelu", {}, 1e-9),
    "ldpv2": ("ldpv2", {}, 1e-9),
    "ldpv1": ("ldp", {}, 1e-9),
    "resampler144_npu_no_out_proj": ("resampler", {"output_projection": False}, 1e-6),
    "resampler144_with_out_proj": ("resampler", {}, 1e-6),
    "tokenpacker_s2_npu_no_out_proj": ("tokenpacker", {"output_projection": False}, 1e-5),
    "tokenpacker_s3_npu_no_out_proj": ("tokenpacker", {"output_projection": False, "scale_factor": 3}, 1e-5),
    "tokenpacker_s2_with_out_proj": ("tokenpacker", {}, 1e-5),
    "tokenpacker_s3_with_out_proj": ("tokenpacker", {"scale_factor": 3}, 1e-5),
    "cabs_hidden1024": ("c_abstractor", {}, 1e-9),
    "cabs_hidden4096": ("c_abstractor", {"hidden_size": 4096}, 1e-9),
}
FAST = {"mlp2x_gelu/clip", "tokenpacker_s3_with_out_proj/clip", "cabs_hidden1024/clip"}
NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in GOLDEN if name.split("/")[0] in CASES
]


def build(type: str, tower: str, options: dict[str, Any], weights: dict[str, torch.Tensor]) -> Projector:
    """A float64 projector, loaded strictly."""
    with torch.device("meta"):
        projector = build_projector(type, vision_hidden_size=WIDTHS[tower][0], text_hidden_size=TEXT, **options)
    projector = projector.double().to_empty(device="cpu")
    if list(projector.buffers()):
        projector.reset_parameters()
    projector.load_state_dict(weights, assign=True)
    return projector


def test_fill_matches_its_self_test() -> None:
    assert uniform(3, 0).tolist() == pytest.approx([0.6145074628, 0.6475565103, 0.7235665293], abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_output_equals_the_original(name: str) -> None:
    golden = GOLDEN[name]
    variant, tower = name.split("/")
    type, options, tolerance = CASES[variant]
    keep = "with_out_proj" in variant
    weights = from_original(type, LLAVA_NPU_2024, fill(golden["state_dict"]), output_projection=keep)
    projector = build(type, tower, options, weights)

    vision, patches = WIDTHS[tower]
    batch = golden["out_shape"][0]
    inputs = features(batch, patches, vision)
    if type == "tokenpacker":
        inputs = torch.cat([inputs, features(batch, patches, 4 * vision, k=1001)], dim=-1)
    output = projector(inputs)

    assert list(output.shape) == golden["out_shape"]
    found = {
        "first": output.flatten()[:4],
        "last": output.flatten()[-4:],
        "mid": output[-1, output.shape[1] // 2, :3],
        "mean": output.mean(),
        "std": output.std(correction=0),
    }
    for key, value in found.items():
        expected = torch.tensor(golden[key], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")
    assert output.abs().sum().item() == pytest.approx(golden["abs_sum"], rel=tolerance)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.split("/")[0] in CASES])
def test_parameter_count_equals_the_original(name: str) -> None:
    """All that the original counts, less what it declares and does not train (position table, dead projection)."""
    variant, tower = name.split("/")
    type, options, _ = CASES[variant]
    width = TEXT if type == "resampler" else WIDTHS[tower][0]
    untrained = 144 * TEXT if type == "resampler" else 0
    dead = width * (width + 1) if "no_out_proj" in variant else 0
    with torch.device("meta"):
        projector = build_projector(type, vision_hidden_size=WIDTHS[tower][0], text_hidden_size=TEXT, **options)
    assert sum(p.numel() for p in projector.parameters()) == GOLDEN[name]["params"] - untrained - dead


@pytest.mark.parametrize(
    ("type", "vision", "count"),
    [
        ("linear", 1024, 4_198_400),
        ("linear", 1152, 4_722_688),
        ("mlp3x_gelu", 1024, 37_761_024),
        ("resampler", 1024, 88_711_168),
        ("identity", 1024, 0),
        ("adaptive_pool", 1024, 20_979_712),
        ("ldpv2", 1024, 20_979_712 + 10 * 4096),
    ],
)
def test_parameter_count(type: str, vision: int, count: int) -> None:
    with torch.device("meta"):
        projector = build_projector(type, vision_hidden_size=vision, text_hidden_size=TEXT)
    assert sum(p.numel() for p in projector.parameters()) == count


def test_position_table() -> None:
    """MAE's `get_2d_sincos_pos_embed(4096, 12)`: columns in the first half, rows in the second."""
    golden = GOLDEN["sincos_pos_embed_4096_12"]
    table = sincos_table(12, TEXT)
    assert list(table.shape) == golden["shape"]
    assert table[1, [0, 1, 1024, 1025, 2048, 3072]].tolist() == pytest.approx(golden["r1"], abs=1e-6)
    assert table[13, [0, 1, 1024, 1025, 2048, 2049, 3072]].tolist() == pytest.approx(golden["r13"], abs=1e-6)
    assert table.double().sum().item() == pytest.approx(golden["sum"], rel=1e-6)


@pytest.mark.parametrize(
    ("output_projection", "first", "last", "abs_sum"),
    [
        (
            True,
            [0.18226584413905958, -0.4310717475476434, -1.4570618639432982],
            [2.0926559523299373, 0.9354227014295862, -0.4210032981400753],
            41007.5405752345,
        ),
        (
            False,
            [0.27106358095736693, -1.189619485537957, -0.16682849956795642],
            [-0.6605769461696664, 0.5048772613243363, -0.8906632911868597],
            40455.81491207272,
        ),
    ],
)
@torch.no_grad()
def test_resampler_of_another_size_equals_the_original(
    output_projection: bool, first: list[float], last: list[float], abs_sum: float
) -> None:
    """OmniLMM's Resampler(20, 64, 4, 96) and, without projection, LLaVA-NPU's, on 27×27 patches.

    Their tables and the resizing of them are float32; computed in float64, the outputs are off by 2e-6.
    """
    shapes: dict[str, tuple[int, ...]] = {"query": (400, 64), "proj": (64, 64), "kv_proj.weight": (64, 96)}
    for layer in ("linear_layers.0", "linear_layers.1", "linear_layers.2", "output_linear"):
        shapes |= {f"attn.{layer}.weight": (64, 64), f"attn.{layer}.bias": (64,)}
    for norm in ("ln_q", "ln_kv", "ln_post"):
        shapes |= {f"{norm}.weight": (64,), f"{norm}.bias": (64,)}
    weights = from_original("resampler", LLAVA_NPU_2024, fill(shapes), output_projection=output_projection)
    projector = build_projector(
        "resampler",
        vision_hidden_size=96,
        text_hidden_size=64,
        num_queries=400,
        num_heads=4,
        output_projection=output_projection,
    ).double()
    projector.load_state_dict(weights)
    output = projector(features(2, 27 * 27, 96))
    assert output.flatten()[:3].tolist() == pytest.approx(first, abs=1e-7)
    assert output.flatten()[-3:].tolist() == pytest.approx(last, abs=1e-7)
    assert output.abs().sum().item() == pytest.approx(abs_sum, rel=1e-8)
