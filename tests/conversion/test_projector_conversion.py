"""Projector weights to and from the original projects' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_npu.errors import UserError
from llava_npu.models.checkpoints.projectors import (
    LLAVA,
    LLAVA_NPU_2024,
    Layout,
    from_original,
    infer_options,
    to_original,
    type_from_original,
)
from llava_npu.models.projectors import Projector, build_projector, load_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "projectors.json").read_text())
RESAMPLER = {"num_queries": 9, "num_heads": 2}
CABS = {"hidden_size": 24, "num_queries": 4, "num_input_tokens": 36, "depth": 2}
HOMES: list[tuple[Layout, str, dict[str, Any]]] = [
    (LLAVA, "linear", {}),
    (LLAVA, "mlp1x_gelu", {}),
    (LLAVA, "mlp2x_gelu", {}),
    (LLAVA, "mlp4x_gelu", {"bias": False}),
    (LLAVA, "identity", {}),
    (LLAVA_NPU_2024, "mlp2x_gelu", {}),
    (LLAVA_NPU_2024, "ldpv2", {}),
    (LLAVA_NPU_2024, "ldp", {}),
    (LLAVA_NPU_2024, "resampler", {**RESAMPLER, "output_projection": False}),
    (LLAVA_NPU_2024, "tokenpacker", {"output_projection": False}),
    (LLAVA_NPU_2024, "c-abs", {**CABS, "hidden_size": 16}),
    (LLAVA_NPU_2024, "c_abstractor", {"depth": 0}),
]


def build(type: str, options: dict[str, Any], vision: int = 16, text: int = 32) -> Projector:
    torch.manual_seed(0)
    return build_projector(type, vision_hidden_size=vision, text_hidden_size=text, **options)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(("layout", "type", "options"), HOMES)
def test_there_and_back(layout: Layout, type: str, options: dict[str, Any]) -> None:
    weights = build(type, options).state_dict()
    original = to_original(type, layout, weights)
    assert_same(from_original(type, layout, original), weights)
    assert_same(to_original(type, layout, from_original(type, layout, original)), original)


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
def test_checkpoint_prefix_is_taken_off(prefix: str) -> None:
    weights = build("mlp2x_gelu", {}).state_dict()
    original = to_original("mlp2x_gelu", LLAVA, weights)
    assert sorted(original) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert_same(from_original("mlp2x_gelu", LLAVA, {prefix + key: t for key, t in original.items()}), weights)


@pytest.mark.parametrize(
    ("name", "type", "options"),
    [
        ("mlp2x_gelu/clip", "mlp2x_gelu", {}),
        ("ldpv2/clip", "ldpv2", {}),
        ("ldpv1/clip", "ldp", {}),
        ("resampler144_npu_no_out_proj/siglip", "resampler", {"output_projection": False}),
        ("resampler144_with_out_proj/clip", "resampler", {}),
        ("tokenpacker_s2_npu_no_out_proj/clip", "tokenpacker", {"output_projection": False}),
        ("tokenpacker_s2_with_out_proj/clip", "tokenpacker", {}),
        ("cabs_hidden1024/clip", "c_abstractor", {}),
        ("cabs_hidden4096/clip", "c_abstractor", {"hidden_size": 4096}),
    ],
)
def test_names_and_shapes_are_those_of_the_predecessor(name: str, type: str, options: dict[str, Any]) -> None:
    """Recorded from the executed originals, at full size; on the meta device."""
    with torch.device("meta"):
        projector = build(type, options, vision=1152 if "siglip" in name else 1024, text=4096)
        original = to_original(type, LLAVA_NPU_2024, projector.state_dict(), output_projection=True)
    assert {key: list(tensor.shape) for key, tensor in original.items()} == GOLDEN[name]["state_dict"]


@pytest.mark.parametrize(("type", "attention"), [("resampler", "attn."), ("tokenpacker", "clip_attn.")])
def test_attention_as_its_authors_have_it(type: str, attention: str) -> None:
    """OmniLMM and TokenPacker hold a torch.nn.MultiheadAttention, and apply its output projection."""
    weights = build(type, RESAMPLER if type == "resampler" else {}).state_dict()
    split = to_original(type, LLAVA_NPU_2024, weights, output_projection=True)
    theirs = {
        key.replace(".output_linear.", ".out_proj."): t for key, t in split.items() if ".linear_layers." not in key
    }
    for kind in ("weight", "bias"):
        layers = [split[f"{attention}linear_layers.{number}.{kind}"] for number in range(3)]
        theirs[f"{attention}in_proj_{kind}"] = torch.cat(layers)
    names = {key.removeprefix(attention) for key in theirs if key.startswith(attention)}
    assert names == set(torch.nn.MultiheadAttention(8, 2).state_dict())
    assert_same(from_original(type, LLAVA_NPU_2024, theirs), weights)


def test_missing_output_projection_becomes_the_identity() -> None:
    """The original applies one always; the identity computes what ours computes."""
    for type, options in (("resampler", RESAMPLER), ("tokenpacker", {})):
        without = build(type, {**options, "output_projection": False})
        original = to_original(type, LLAVA_NPU_2024, without.state_dict())
        with_projection = build(type, options)
        load_weights(with_projection, from_original(type, LLAVA_NPU_2024, original, output_projection=True))
        features = torch.randn(2, 36, without.input_channels)
        torch.testing.assert_close(with_projection(features), without(features))


def test_predecessors_unused_output_projection() -> None:
    full = build("resampler", RESAMPLER).state_dict()
    with pytest.raises(UserError, match="never applies"):
        to_original("resampler", LLAVA_NPU_2024, full)
    original = to_original("resampler", LLAVA_NPU_2024, full, output_projection=True)
    assert_same(from_original("resampler", LLAVA_NPU_2024, original, output_projection=True), full)
    dropped = from_original("resampler", LLAVA_NPU_2024, original)
    assert set(full) - set(dropped) == {"attn.out_proj.weight", "attn.out_proj.bias"}
    assert infer_options("resampler", dropped)["output_projection"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fixed_table_is_dropped_in_any_precision(dtype: torch.dtype) -> None:
    original = to_original(
        "resampler", LLAVA_NPU_2024, build("resampler", RESAMPLER).to(dtype).state_dict(), output_projection=True
    )
    assert original["pos_embed"].dtype == dtype
    assert "pos_embed" not in from_original("resampler", LLAVA_NPU_2024, original, output_projection=True)


def test_trained_table_is_kept() -> None:
    """The predecessor's first stage trains it."""
    original = to_original(
        "resampler", LLAVA_NPU_2024, build("resampler", RESAMPLER).state_dict(), output_projection=True
    )
    original["pos_embed"] = original["pos_embed"] + 0.1
    converted = from_original("resampler", LLAVA_NPU_2024, original, output_projection=True)
    options = infer_options("resampler", converted)
    assert options["learned_positions"] is True
    projector = build("resampler", {**RESAMPLER, **options})
    load_weights(projector, converted)
    assert torch.equal(projector.pos_embed, original["pos_embed"])
    assert_same(to_original("resampler", LLAVA_NPU_2024, projector.state_dict(), output_projection=True), original)
    with pytest.raises(UserError, match="pos_embed does not belong"):
        load_weights(build("resampler", RESAMPLER), converted)


@pytest.mark.parametrize(
    ("type", "options"),
    [
        ("mlp5x_gelu", {"depth": 5, "bias": False}),
        ("resampler", {"num_queries": 16, "output_projection": False, "learned_positions": False}),
        ("c_abstractor", {"hidden_size": 24, "num_input_tokens": 36, "depth": 2}),
    ],
)
def test_infer_options(type: str, options: dict[str, Any]) -> None:
    assert infer_options(type, build(type, options).state_dict()) == options


@pytest.mark.parametrize(
    ("layout", "name", "type"),
    [
        (LLAVA_NPU_2024, "ldp", "ldpv2"),
        (LLAVA_NPU_2024, "my_cabs_projector", "c_abstractor"),
        (LLAVA_NPU_2024, "resampler_144", "resampler"),
        (LLAVA_NPU_2024, "mlp2x_gelu", "mlp2x_gelu"),
        (LLAVA, "linear", "linear"),
    ],
)
def test_type_names_of_originals(layout: Layout, name: str, type: str) -> None:
    assert type_from_original(layout, name) == type


class TestBadInput:
    def check(self, call: Any, *parts: str) -> None:
        with pytest.raises(UserError) as caught:
            call()
        for part in parts:
            assert part in str(caught.value)

    def original(self, type: str, layout: Layout, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        return to_original(type, layout, build(type, options).state_dict())

    def test_missing_keys_are_named_as_in_the_file(self) -> None:
        original = self.original("ldpv2", LLAVA_NPU_2024, {})
        del original["peg.peg.0.bias"], original["mlp.mlp.2.weight"]
        self.check(
            lambda: from_original("ldpv2", LLAVA_NPU_2024, original), "missing mlp.mlp.2.weight", "peg.peg.0.bias"
        )

    def test_missing_key_that_tells_the_size(self) -> None:
        original = self.original("mlp2x_gelu", LLAVA, {})
        del original["0.weight"]
        self.check(lambda: from_original("mlp2x_gelu", LLAVA, original), "missing 0.weight")
        self.check(lambda: from_original("mlp2x_gelu", LLAVA, {}), "missing 0.weight")

    def test_missing_part_of_the_attention(self) -> None:
        original = self.original("tokenpacker", LLAVA_NPU_2024, {"output_projection": False})
        del original["clip_attn.linear_layers.1.bias"]
        self.check(lambda: from_original("tokenpacker", LLAVA_NPU_2024, original), "clip_attn.linear_layers.1.bias")

    def test_unexpected_keys(self) -> None:
        original = self.original("c_abstractor", LLAVA_NPU_2024, CABS)
        original["eos_tokens"] = torch.zeros(1, 2, 32)
        self.check(lambda: from_original("c_abstractor", LLAVA_NPU_2024, original), "unexpected eos_tokens")

    def test_identity_has_no_weights(self) -> None:
        self.check(lambda: from_original("identity", LLAVA, {"0.weight": torch.zeros(1, 1)}), "unexpected 0.weight")

    def test_shapes_that_contradict_each_other(self) -> None:
        original = self.original("mlp2x_gelu", LLAVA, {})
        original["2.bias"] = torch.zeros(7)
        self.check(lambda: from_original("mlp2x_gelu", LLAVA, original), "2.bias", "(7,)", "(32,)")

    def test_wrong_number_of_dimensions(self) -> None:
        original = self.original("mlp2x_gelu", LLAVA, {})
        original["0.weight"] = torch.zeros(0)  # what ZeRO-3 saves without gathering
        self.check(lambda: from_original("mlp2x_gelu", LLAVA, original), "0.weight", "(0,)", "2 dimensions")

    def test_depth_that_contradicts_the_type(self) -> None:
        original = self.original("mlp3x_gelu", LLAVA, {})
        self.check(lambda: from_original("mlp2x_gelu", LLAVA, original), "depth=2", "depth=3")

    def test_projector_that_the_project_does_not_have(self) -> None:
        self.check(
            lambda: from_original("resampler", LLAVA, {}), "official LLaVA has no projector 'resampler'", "mlp{N}x_gelu"
        )
        self.check(lambda: to_original("adaptive_pool", LLAVA_NPU_2024, {}), "c_abstractor")

    def test_unknown_type(self) -> None:
        self.check(lambda: from_original("reampler", LLAVA_NPU_2024, {}), "'reampler'", "'resampler'")

    def test_our_weights_incomplete(self) -> None:
        weights = build("ldpv2", {}).state_dict()
        del weights["peg.weight"]
        self.check(lambda: to_original("ldpv2", LLAVA_NPU_2024, weights), "missing peg.weight")
