"""Outputs and gradients against slow spelled-out references, for geometries that the golden file does not have.

References: `reference_projectors.py` (torch.nn.MultiheadAttention, AdaptiveAvgPool2d, interpolate); transformers'
Idefics3 connector and InternVL's two-step reshaping for the pixel shuffle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from llava_npu.models.checkpoints.projectors import LLAVA_NPU_2024, from_original, to_original
from llava_npu.models.projectors import Projector, build_projector, load_weights
from llava_npu.models.projectors.grid import average_pool, to_blocks
from llava_npu.models.projectors.tokenpacker import block_centres
from support import reference_projectors as reference

CASES: list[tuple[str, dict[str, Any], int, int, tuple[int, int]]] = [
    ("mlp1x_gelu", {}, 12, 20, (3, 5)),
    ("mlp4x_gelu", {}, 12, 20, (3, 3)),
    ("ldpv2", {"num_queries": 4}, 12, 20, (27, 27)),
    ("ldpv2", {"num_queries": 9}, 12, 20, (6, 9)),
    ("ldpv2", {"num_queries": 144}, 12, 20, (16, 16)),
    ("ldpv2", {"num_queries": 16}, 12, 20, (3, 3)),
    ("ldp", {}, 12, 48, (7, 4)),
    ("ldp", {}, 12, 36, (6, 6)),
    ("resampler", {"num_queries": 16}, 12, 256, (4, 4)),
    ("resampler", {"num_queries": 9, "num_heads": 4}, 12, 32, (5, 7)),
    ("resampler", {"num_queries": 9, "output_projection": False}, 12, 32, (27, 27)),
    ("resampler", {"num_queries": 4, "num_heads": 2}, 32, 32, (6, 6)),
    ("tokenpacker", {"scale_factor": 2}, 16, 20, (6, 8)),
    ("tokenpacker", {"scale_factor": 3}, 16, 20, (27, 27)),
    ("tokenpacker", {"scale_factor": 4, "output_projection": False}, 16, 20, (16, 16)),
    ("tokenpacker", {"scale_factor": 1, "num_heads": 2}, 16, 20, (3, 2)),
    ("c_abstractor", {"hidden_size": 24, "num_queries": 4, "num_input_tokens": 35, "depth": 2}, 12, 20, (5, 7)),
    ("c_abstractor", {"hidden_size": 12, "num_queries": 9, "num_input_tokens": 36, "depth": 1}, 12, 20, (6, 6)),
    ("c_abstractor", {"num_queries": 4, "num_input_tokens": 16, "depth": 0}, 12, 20, (4, 4)),
]


def randomise(projector: Projector) -> None:
    """Weights far from their initial values, so that every term of the computation counts."""
    for parameter in projector.parameters():
        noise = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5)


def reference_for(type: str) -> Any:
    return reference.mlp if type.startswith("mlp") else getattr(reference, type)


@pytest.mark.parametrize(("type", "options", "vision", "text", "grid"), CASES)
def test_output_and_gradients_equal_the_reference(
    type: str, options: dict[str, Any], vision: int, text: int, grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    projector = build_projector(type, vision_hidden_size=vision, text_hidden_size=text, **options).double()
    randomise(projector)
    inputs = torch.randn(2, grid[0] * grid[1], projector.input_channels, dtype=torch.float64, requires_grad=True)
    output = projector(inputs, grid)
    target = torch.randn_like(output)
    ours = torch.autograd.grad((output * target).sum(), [inputs, *projector.parameters()], allow_unused=True)

    keep = projector.options.__dict__.get("output_projection", False)
    original = to_original(type, LLAVA_NPU_2024, projector.state_dict(), output_projection=keep)
    leaves = {key: tensor.detach().clone().requires_grad_() for key, tensor in original.items()}
    expected = reference_for(type)(leaves, inputs, grid, projector.options.__dict__)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)

    theirs = torch.autograd.grad((expected * target).sum(), [inputs, *leaves.values()], allow_unused=True)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    unused = {key for key, grad in zip(leaves, theirs[1:], strict=True) if grad is None}
    if keep or type not in ("resampler", "tokenpacker"):
        assert unused <= {"pos_embed"}
    gradients = dict(zip(leaves, theirs[1:], strict=True)) | {key: torch.zeros_like(leaves[key]) for key in unused}
    if type == "resampler":
        gradients["pos_embed"] = original["pos_embed"]  # a table, not a weight: only there to be taken off
    converted = from_original(type, LLAVA_NPU_2024, gradients, output_projection=keep)
    for (name, _), gradient in zip(projector.named_parameters(), ours[1:], strict=True):
        assert gradient is not None, f"{name} is not used"
        torch.testing.assert_close(gradient, converted[name], rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_mlp_equals_transformers() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    vision = CLIPVisionConfig(hidden_size=12, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(hidden_size=20, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    theirs = LlavaMultiModalProjector(LlavaConfig(vision_config=vision, text_config=text))
    ours = build_projector("mlp2x_gelu", vision_hidden_size=12, text_hidden_size=20)
    load_weights(ours, theirs.state_dict())
    features = torch.randn(2, 10, 12)
    assert torch.equal(ours(features), theirs(features))


def test_pixel_shuffle_equals_idefics3() -> None:
    """transformers' Idefics3 connector: no norm, one layer, no bias."""
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    config = Idefics3Config(
        vision_config={"hidden_size": 12},
        text_config={"model_type": "llama", "hidden_size": 20, "num_attention_heads": 2, "pad_token_id": 0},
        scale_factor=3,
    )
    theirs = Idefics3Connector(config)
    ours = build_projector(
        "pixel_shuffle", vision_hidden_size=12, text_hidden_size=20, scale_factor=3, depth=1, norm=False, bias=False
    )
    load_weights(ours, {"mlp.linear_1.weight": theirs.modality_projection.proj.weight})
    features = torch.randn(2, 36, 12)
    torch.testing.assert_close(ours(features), theirs(features))


def test_pixel_shuffle_equals_internvl() -> None:
    """InternVL halves columns, swaps, halves rows, swaps back; then norm, linear, GELU, linear."""
    torch.manual_seed(0)
    ours = build_projector("pixel_shuffle", vision_hidden_size=12, text_hidden_size=20)
    randomise(ours)
    connector = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 20), nn.GELU(), nn.Linear(20, 20))
    weights = ours.state_dict()
    for layer, name in ((connector[0], "norm"), (connector[1], "mlp.linear_1"), (connector[3], "mlp.linear_2")):
        layer.load_state_dict({kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias")})
    features = torch.randn(2, 6 * 4, 12)
    columns = features.reshape(2, 6, 2, 24).permute(0, 2, 1, 3)  # (batch, columns/2, rows, 2·channels)
    shuffled = columns.reshape(2, 2, 3, 48).permute(0, 2, 1, 3)  # (batch, rows/2, columns/2, 4·channels)
    torch.testing.assert_close(ours(features, (6, 4)), connector(shuffled.reshape(2, 6, 48)))


def test_adaptive_pool_is_pooling_then_mlp() -> None:
    torch.manual_seed(0)
    pooling = build_projector("adaptive_pool", vision_hidden_size=12, text_hidden_size=20, num_queries=9)
    mlp = build_projector("mlp2x_gelu", vision_hidden_size=12, text_hidden_size=20)
    load_weights(mlp, pooling.mlp.state_dict())
    features = torch.randn(2, 7 * 5, 12)
    pooled = functional.adaptive_avg_pool2d(features.transpose(1, 2).unflatten(2, (7, 5)), 3)
    torch.testing.assert_close(pooling(features, (7, 5)), mlp(pooled.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("grid", [(24, 24), (27, 27), (24, 12), (5, 30), (4, 4)])
@pytest.mark.parametrize("side", [1, 3, 12])
def test_average_pool_equals_torch(grid: tuple[int, int], side: int) -> None:
    feature_map = torch.randn(2, 3, *grid, dtype=torch.float64)
    expected = nn.AdaptiveAvgPool2d(side)(feature_map)
    torch.testing.assert_close(average_pool(feature_map, (side, side)), expected)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 6])
def test_block_centres_equal_bilinear_interpolation(scale: int) -> None:
    tokens = torch.randn(2, 24 * 12, 5, dtype=torch.float64)
    as_map = tokens.transpose(1, 2).unflatten(2, (24, 12))
    expected = functional.interpolate(as_map, (24 // scale, 12 // scale), mode="bilinear", align_corners=False)
    centres = block_centres(to_blocks(tokens, (24, 12), scale), scale)
    torch.testing.assert_close(centres, expected.flatten(2).transpose(1, 2))
