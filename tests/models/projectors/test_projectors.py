"""What every registered projector must do: count tokens, train, save, load, survive low precision and compilation."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from llava_npu.errors import UserError
from llava_npu.models import projectors
from llava_npu.models.projectors import Projector, build_projector, load_weights, num_tokens

VISION, TEXT, GRID = 16, 32, (6, 6)
OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive_pool": {"num_queries": 4},
    "c_abstractor": {"hidden_size": 24, "num_queries": 4, "num_input_tokens": 36, "depth": 2},
    "d_abstractor": {"hidden_size": 16, "num_queries": 4, "num_input_tokens": 36, "num_layers": 2, "num_heads": 2},
    "dense_dci": {"groups": [2, 3]},
    "dense_sci": {"layers": [1]},
    "dense_sti": {"layers": [1, 2]},
    "identity": {},
    "ldp": {},
    "ldpv2": {"num_queries": 9},
    "linear": {},
    "matryoshka_pool": {"tokens": 9},
    "mlp2x_gelu": {},
    "mqt": {"num_queries": 9, "tokens": 4, "num_heads": 4},
    "patch_merger": {},
    "pixel_shuffle": {},
    "qformer": {"num_queries": 5, "hidden_size": 16, "num_layers": 3, "num_heads": 2},
    "resampler": {"num_queries": 9, "num_heads": 4},
    "sva": {
        "num_queries": 9,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "tower_sides": [12, 6],
        "tower_widths": [2, 8],
    },
    "tokenpacker": {"num_heads": 4},
}
VARIANTS = [
    *OPTIONS.items(),
    ("mlp3x_gelu", {"bias": False}),
    ("pixel_shuffle", {"depth": 1, "norm": False, "bias": False, "scale_factor": 3}),
    ("resampler", {"num_queries": 4, "output_projection": False}),
    ("resampler", {"num_queries": 4, "learned_positions": True}),
    ("tokenpacker", {"num_heads": 2, "output_projection": False, "region_layers": [3, 5]}),
    ("c_abstractor", {"num_queries": 4, "num_input_tokens": 36, "depth": 0}),
]
each_variant = pytest.mark.parametrize(("type", "options"), VARIANTS)
trainable_variants = pytest.mark.parametrize(("type", "options"), [case for case in VARIANTS if case[0] != "identity"])


def build(type: str, options: dict[str, Any]) -> Projector:
    return build_projector(type, vision_hidden_size=VISION, text_hidden_size=TEXT, **options)


def random_features(projector: Projector, grid: tuple[int, int] = GRID, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, grid[0] * grid[1], projector.input_channels)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_registered_projector_is_tested() -> None:
    assert {projectors.canonical_type(name) for name in OPTIONS} == set(OPTIONS)
    assert {projectors.registered_name(name) for name in OPTIONS} == set(projectors.available())


@pytest.mark.slow
def test_imports_without_transformers() -> None:
    code = "import sys, llava_npu.models.projectors; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@each_variant
def test_shape_dtype_and_inferred_grid(type: str, options: dict[str, Any]) -> None:
    projector = build(type, options)
    features = random_features(projector)
    output = projector(features)
    assert output.shape == (2, projector.num_tokens(GRID), projector.output_channels)
    assert output.dtype == features.dtype
    assert torch.equal(output, projector(features, GRID))


@each_variant
def test_images_do_not_mix(type: str, options: dict[str, Any]) -> None:
    projector = build(type, options)
    features = random_features(projector, batch=3)
    separate = torch.cat([projector(image[None], GRID) for image in features])
    torch.testing.assert_close(projector(features, GRID), separate)


@each_variant
def test_input_is_not_changed(type: str, options: dict[str, Any]) -> None:
    projector = build(type, options)
    features = random_features(projector)
    before = features.clone()
    projector(features)
    assert torch.equal(features, before)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    type=st.sampled_from(["adaptive_pool", "c_abstractor", "identity", "ldp", "ldpv2", "linear", "mlp2x_gelu",
                          "pixel_shuffle", "resampler", "tokenpacker"]),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    side=st.integers(1, 5),
    scale=st.integers(1, 4),
)  # fmt: skip
def test_num_tokens_is_what_comes_out(type: str, height: int, width: int, side: int, scale: int) -> None:
    options: dict[str, Any] = {}
    names = projectors.make_options(type).names()
    if "num_queries" in names:
        options["num_queries"] = side * side
    if "scale_factor" in names:
        options["scale_factor"] = scale
    options |= projectors.grid_defaults(type, (height, width))
    try:
        expected = num_tokens(type, (height, width), **options)
    except UserError as error:
        assert height % scale or width % scale
        assert f"{height}×{width}" in str(error)  # noqa: PT017  (both branches of the property are asserted)
        return
    projector = build_projector(type, vision_hidden_size=8, text_hidden_size=16, **options)
    assert projector.num_tokens((height, width)) == expected
    with torch.no_grad():
        assert projector(random_features(projector, (height, width), 1), (height, width)).shape[1] == expected


@pytest.mark.parametrize("type", ["identity", "linear", "mlp2x_gelu"])
def test_class_tokens_pass_through_where_no_grid_is_needed(type: str) -> None:
    projector = build(type, {})
    assert projector(torch.randn(2, 577, VISION)).shape[1] == projector.num_tokens((24, 24), special_tokens=1) == 577


@pytest.mark.parametrize("grid", [(24, 24), (27, 27), (16, 16), (24, 16)])
def test_tokens_of_the_field(grid: tuple[int, int]) -> None:
    """The table in docs/projectors.md."""
    patches = grid[0] * grid[1]
    assert num_tokens("mlp2x_gelu", grid) == patches
    assert num_tokens("ldpv2", grid) == num_tokens("resampler", grid) == num_tokens("adaptive_pool", grid) == 144
    assert num_tokens("ldp", grid) == {576: 144, 729: 196, 256: 64, 384: 96}[patches]
    assert num_tokens("c_abstractor", grid, num_input_tokens=patches) == 144
    if patches == 729:
        assert (
            num_tokens("tokenpacker", grid, scale_factor=3) == num_tokens("pixel_shuffle", grid, scale_factor=3) == 81
        )
    else:
        assert num_tokens("tokenpacker", grid) == num_tokens("pixel_shuffle", grid) == patches // 4


@pytest.mark.slow
@trainable_variants
def test_gradient_reaches_every_parameter_and_it_trains(type: str, options: dict[str, Any]) -> None:
    projector = build(type, options)
    features = random_features(projector)
    target = torch.randn_like(projector(features))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(projector(features), target)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in projector.named_parameters():
            assert parameter.grad is not None, f"{name} is not used"
            assert parameter.grad.isfinite().all(), name
            if name != "ln_k.bias":  # adds the same to every key of a query: attention does not feel it
                assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@trainable_variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(type: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    projector = build(type, options)
    features = random_features(projector)
    exact = projector(features)
    low = copy.deepcopy(projector).to(dtype)
    output = low(features.to(dtype))
    assert output.dtype == dtype
    error = (output.float() - exact).norm() / exact.norm()
    assert error < 0.05
    output.float().square().mean().backward()
    for name, parameter in low.named_parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all(), name


@trainable_variants
def test_autocast(type: str, options: dict[str, Any]) -> None:
    projector = build(type, options)
    features = random_features(projector)
    with torch.autocast("cpu", torch.bfloat16):
        output = projector(features.bfloat16())
    output.float().sum().backward()
    error = (output.float() - projector(features)).norm() / output.float().norm()
    assert error < 0.05
    assert all(parameter.grad.dtype == torch.float32 for parameter in projector.parameters())


@trainable_variants
def test_gradient_checkpointing_changes_nothing(type: str, options: dict[str, Any]) -> None:
    projector = build(type, options)
    features = random_features(projector).requires_grad_()
    plain = torch.autograd.grad(projector(features).square().sum(), [features, *projector.parameters()])
    output = checkpoint(projector, features, GRID, use_reentrant=False)
    saved = torch.autograd.grad(output.square().sum(), [features, *projector.parameters()])
    for one, other in zip(plain, saved, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@trainable_variants
def test_compiles_without_graph_breaks(type: str, options: dict[str, Any]) -> None:
    projector = build(type, options)
    features = random_features(projector)
    compiled = torch.compile(projector, backend="aot_eager", fullgraph=True)
    output = compiled(features, GRID)
    torch.testing.assert_close(output, projector(features, GRID))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())
    torch._dynamo.reset()


@each_variant
def test_state_dict_round_trip_under_a_parent(type: str, options: dict[str, Any]) -> None:
    """The predecessor's C-Abstractor could not be loaded as a part of a model."""
    parent = nn.ModuleDict({"projector": build(type, options)})
    other = nn.ModuleDict({"projector": build(type, options)})
    parameters = list(other.parameters())
    assert not other.load_state_dict(parent.state_dict()).missing_keys
    assert all(one is two for one, two in zip(parameters, other.parameters(), strict=True))  # optimizers keep hold
    features = random_features(parent["projector"])
    assert torch.equal(parent["projector"](features), other["projector"](features))
    assert torch.equal(parent["projector"](features), copy.deepcopy(parent)["projector"](features))


@each_variant
def test_state_dict_holds_parameters_alone(type: str, options: dict[str, Any]) -> None:
    """Loaders for sharded models (accelerate's for FSDP2) take every entry for a sharded parameter."""
    projector = build(type, options)
    assert set(projector.state_dict()) == {name for name, _ in projector.named_parameters()}


@each_variant
def test_meta_construction_then_init_weights(type: str, options: dict[str, Any]) -> None:
    """FSDP2's way: build without memory, shard, allocate, initialise."""
    with torch.device("meta"):
        projector = build(type, options)
    projector.to_empty(device="cpu")
    for tensor in [*projector.parameters(), *projector.buffers()]:
        nn.init.constant_(tensor, float("nan"))
    projector.init_weights()
    assert all(tensor.isfinite().all() for tensor in [*projector.parameters(), *projector.buffers()])
    fresh = build(type, options)
    for name, parameter in projector.named_parameters():
        other = fresh.get_parameter(name)
        deviation = 5 * other.std().item() / other.numel() ** 0.5  # of a mean: of few N(0, 1) values more than 0.15
        assert parameter.mean().item() == pytest.approx(other.mean().item(), abs=max(0.15, deviation))
        assert (parameter.std().item() if len(parameter) > 1 else 0) == pytest.approx(
            other.std().item() if len(parameter) > 1 else 0, rel=0.4, abs=1e-3
        ), name
    for name, buffer in projector.named_buffers():
        assert torch.equal(buffer, fresh.get_buffer(name))


def test_initialisation_follows_the_sources() -> None:
    resampler = build_projector("resampler", vision_hidden_size=64, text_hidden_size=512)
    assert resampler.query.std().item() == pytest.approx(0.02, rel=0.05)
    assert resampler.kv_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert resampler.proj.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert resampler.attn.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert resampler.attn.out_proj.bias.abs().max() == resampler.attn.in_proj_bias.abs().max() == 0
    xavier = nn.MultiheadAttention(512, 4).in_proj_weight.std().item()
    assert resampler.attn.in_proj_weight.std().item() == pytest.approx(xavier, rel=0.02)

    packer = build_projector("tokenpacker", vision_hidden_size=128, text_hidden_size=256)
    for layer in (packer.q_proj, packer.k_proj.linear_1, packer.v_proj.linear_2, packer.mlp.linear_2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias is None or layer.bias.abs().max() == 0

    abstractor = build_projector("c_abstractor", vision_hidden_size=64, text_hidden_size=128, hidden_size=128)
    assert abstractor.pos_emb.std().item() == pytest.approx(0.02, rel=0.05)
    assert abstractor.stage_1[0].conv_1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert abstractor.readout.linear_1.bias.abs().max() == 0

    mlp = build_projector("mlp2x_gelu", vision_hidden_size=64, text_hidden_size=128)
    assert mlp.linear_1.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.05)  # torch's own uniform


def test_resampler_positions_are_fixed() -> None:
    projector = build("resampler", OPTIONS["resampler"])
    assert "pos_embed" not in dict(projector.named_parameters())
    assert "pos_embed" in dict(projector.named_buffers())
    learned = build("resampler", {"num_queries": 9, "learned_positions": True})
    assert torch.equal(learned.pos_embed, projector.pos_embed)  # learning starts from the table


def test_output_projection_false_has_no_dead_weights() -> None:
    for type in ("resampler", "tokenpacker"):
        assert not [key for key in build(type, {"output_projection": False}).state_dict() if "out_proj" in key]


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ("ldpnetv2", "ldpv2"),
        ("ldpnet", "ldp"),
        ("cabs", "c_abstractor"),
        ("c-abs", "c_abstractor"),
        ("abs", "c_abstractor"),
        ("TokenPacker", "tokenpacker"),
        ("mlp_gelu", "mlp2x_gelu"),
        ("gelu-mlp", "mlp2x_gelu"),
        ("mlp7x_gelu", "mlp7x_gelu"),
        ("adaptivepool", "adaptive_pool"),
    ],
)
def test_names_of_other_projects(alias: str, canonical: str) -> None:
    assert projectors.canonical_type(alias) == canonical


def test_feature_layers() -> None:
    assert projectors.feature_layers("mlp2x_gelu", -2) == [-2]
    assert projectors.feature_layers("tokenpacker", -2) == [-2, 12, 16, 22, 23]
    assert build("tokenpacker", {"region_layers": [3, 5, 7]}).input_channels == 4 * VISION


class TestBadInput:
    """Every message names what was given and what would do."""

    def check(self, call: Any, *parts: str) -> None:
        with pytest.raises(UserError) as caught:
            call()
        for part in parts:
            assert part in str(caught.value)

    def test_unknown_type(self) -> None:
        self.check(lambda: build("mpl2x_gelu", {}), "'mpl2x_gelu'", "Did you mean 'mlp2x_gelu'?", "resampler", "ldpv2")
        self.check(lambda: build(None, {}), "None", "resampler")  # type: ignore[arg-type]

    def test_unknown_option(self) -> None:
        self.check(lambda: build("resampler", {"num_query": 4}), "'num_query'", "'num_queries'", "num_heads")
        self.check(lambda: build("ldp", {"num_queries": 4}), "'ldp'", "none")

    @pytest.mark.parametrize(
        ("type", "options", "parts"),
        [
            ("ldpv2", {"num_queries": 145}, ("num_queries=145", "144, 169")),
            ("ldpv2", {"num_queries": 0}, ("num_queries=0",)),
            ("ldpv2", {"num_queries": "144"}, ("num_queries='144'", "whole number")),
            ("ldpv2", {"num_queries": True}, ("num_queries=True", "whole number")),
            ("resampler", {"num_heads": 5}, ("num_heads=5", "32")),
            ("resampler", {"num_heads": 0}, ("num_heads=0",)),
            ("resampler", {"output_projection": 1}, ("output_projection=1", "true or false")),
            ("tokenpacker", {"scale_factor": 0}, ("scale_factor=0",)),
            ("tokenpacker", {"num_heads": 3}, ("num_heads=3", "16")),
            ("tokenpacker", {"region_layers": []}, ("region_layers",)),
            ("tokenpacker", {"region_layers": ["a"]}, ("region_layers", "whole numbers")),
            ("c_abstractor", {"depth": -1}, ("depth=-1",)),
            ("mqt", {"num_queries": 10}, ("num_queries=10", "9, 16")),
            ("mqt", {"tokens": 0}, ("tokens=0",)),
            ("mqt", {"num_heads": 3}, ("num_heads=3", "16")),
            ("d_abstractor", {"num_heads": 3}, ("num_heads=3", "1024")),
            ("d_abstractor", {"num_points": 0}, ("num_points=0",)),
            ("sva", {"num_heads": 3}, ("num_heads=3", "1024")),
            ("sva", {"query_groups": [9, 8]}, ("query_groups=(9, 8)", "square numbers")),
            ("sva", {"tower_sides": []}, ("tower_sides=()",)),
            ("sva", {"tower_sides": [24, 12]}, ("tower_widths=None", "tower_sides [24, 12]")),
            ("sva", {"tower_widths": [8, 8]}, ("tower_widths=(8, 8)", "tower_sides [24]")),
            ("mlp3x_gelu", {"depth": 2}, ("depth=3", "depth=2")),
            ("mlp0x_gelu", {}, ("depth=0",)),
        ],
    )
    def test_impossible_value(self, type: str, options: dict[str, Any], parts: tuple[str, ...]) -> None:
        self.check(lambda: build(type, options), type.split("3")[0].split("0")[0], *parts)

    def test_impossible_sizes(self) -> None:
        self.check(lambda: build_projector("linear", vision_hidden_size=0, text_hidden_size=4), "vision_hidden_size")
        self.check(
            lambda: build_projector("resampler", vision_hidden_size=8, text_hidden_size=30), "30", "multiple of 4"
        )

    def test_grid_that_cannot_be_cut(self) -> None:
        self.check(lambda: num_tokens("tokenpacker", (27, 27)), "27×27", "scale_factor 3 or 9", "26×26 or 28×28")
        self.check(lambda: num_tokens("pixel_shuffle", (5, 7)), "5×7", "no scale_factor but 1", "4×6 or 6×8")
        self.check(lambda: build("tokenpacker", {})(torch.zeros(1, 9, 5 * VISION)), "3×3", "scale_factor 3")

    def test_queries_whose_blocks_do_not_fit_the_towers(self) -> None:
        towers = {"tower_sides": [24, 16], "tower_widths": [1, 1]}
        self.check(
            lambda: num_tokens("sva", (8, 8), num_queries=144, **towers),
            "12×12 queries (num_queries: 144)", "24×24 and 16×16", "num_queries can be 1, 4, 16, 64", "12×12",
        )  # fmt: skip
        self.check(
            lambda: num_tokens("sva", (27, 27), query_groups=[81, 576], tower_sides=[27]),
            "query_groups: 576", "1, 9, 81, 729", "24×24 or 48×48",
        )  # fmt: skip
        self.check(lambda: num_tokens("sva", (27, 27)), "24×24", "27×27", "Leave it out")
        self.check(lambda: num_tokens("sva", (5, 7)), "5×7")

    def test_number_of_tokens_that_cannot_be(self) -> None:
        self.check(lambda: num_tokens("matryoshka_pool", (27, 27), tokens=144), "144", "27×27", "1, 9, 81, 729")
        self.check(lambda: num_tokens("matryoshka_pool", (24, 24), tokens=100), "4, 9, 16, 36, 64, 144, 576")
        self.check(lambda: num_tokens("mqt", (24, 24), tokens=257), "257", "1 to 256")

    def test_grid_that_is_none(self) -> None:
        for grid in [(24,), 24, (0, 24), (24.0, 24), "24", None, (True, 2)]:
            self.check(lambda grid=grid: num_tokens("ldpv2", grid), "(height, width)", repr(grid))

    def test_features_that_do_not_fit(self) -> None:
        projector = build("ldpv2", OPTIONS["ldpv2"])
        self.check(lambda: projector(torch.zeros(1, 577, VISION)), "577", "24×24 patches and 1 more", "patch")
        self.check(lambda: projector(torch.zeros(1, 36, VISION), (5, 7)), "5×7", "36")
        self.check(lambda: projector(torch.zeros(1, 36, 8)), str(VISION), "(1, 36, 8)")
        self.check(lambda: projector(torch.zeros(36, VISION)), "(36, 16)")
        self.check(lambda: build("tokenpacker", {})(torch.zeros(1, 36, VISION)), "5 layers of 16", "80")
        self.check(lambda: build("identity", {})(torch.zeros(1, 36, 8)), "16")

    def test_class_tokens_where_the_grid_counts(self) -> None:
        self.check(lambda: num_tokens("resampler", (24, 24), special_tokens=1), "resampler", "1 class", "patch")

    def test_positions_for_another_tower(self) -> None:
        for type in ("c_abstractor", "d_abstractor"):
            self.check(lambda type=type: num_tokens(type, (27, 27)), type, "576", "27×27", "num_input_tokens: 729")

    def test_weights_that_do_not_fit(self) -> None:
        projector = build("mlp2x_gelu", {})
        weights = dict(projector.state_dict())
        weights["linear_3.bias"] = weights.pop("linear_2.bias")
        weights["linear_1.weight"] = torch.zeros(32, 1024)
        before = projector.linear_2.weight.clone()
        self.check(
            lambda: load_weights(projector, weights, "file.safetensors"),
            "file.safetensors", "linear_2.bias is missing", "linear_3.bias", "(32, 1024)", "(32, 16)",
        )  # fmt: skip
        assert torch.equal(projector.linear_2.weight, before)


@pytest.mark.parametrize("type", ["mqt", "resampler", "sva", "tokenpacker"])
def test_attention_goes_through_the_devices_operator(device: torch.device, type: str) -> None:
    """What `llava-npu verify` compares is what runs."""
    if device.type != "npu":
        pytest.skip("other devices use torch's own attention")
    from torch_npu.simulation import op_counts

    projector = build(type, OPTIONS[type])
    features = random_features(projector).to(device)
    projector = projector.to(device)
    with op_counts() as counts:
        projector(features)
    assert counts["npu::npu_fusion_attention"] == 1
