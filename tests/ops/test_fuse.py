"""Reference: transformers' own modules, unfused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm_rotary
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from llava_npu.ops.fuse import FusedModules, Operation, fuse
from llava_npu.ops.rms_norm import offset_rms_norm, rms_norm
from llava_npu.ops.rotary import apply_repeated_neighbour_rotary, apply_rotary
from llava_npu.ops.swiglu import swiglu

ALL: tuple[Operation, ...] = ("rms_norm", "rotary", "swiglu")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def rope(**parameters: Any) -> dict[str, Any]:
    return {**SIZES, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 10000.0, **parameters}}


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**rope(rope_type="default")),
    "llama-theta": lambda: LlamaConfig(**rope(rope_type="default", rope_theta=500.0)),
    "llama-linear": lambda: LlamaConfig(**rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": lambda: LlamaConfig(**rope(rope_type="dynamic", factor=4.0)),
    "llama-3": lambda: LlamaConfig(**rope(**LLAMA3_SCALING)),
    "llama-biases": lambda: LlamaConfig(**rope(rope_type="default"), attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=1),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
}


def build(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(device)


def outputs_and_gradients(model: torch.nn.Module, device: torch.device) -> list[torch.Tensor]:
    ids = torch.arange(5, 45).reshape(2, 20).to(device)
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("family", FAMILY)
def test_logits_and_gradients_stay_the_same(family: str, device: torch.device) -> None:
    model = build(FAMILY[family](), device)
    plain = outputs_and_gradients(model, device)
    keys = list(model.state_dict())
    fused = fuse(model, device, ALL)
    per_layer_norms = 4 if family == "qwen3" else 2
    assert fused.count("rms_norm") == 2 * per_layer_norms + 1
    assert fused.count("rotary") == 2
    assert fused.count("swiglu") == 2
    assert fused.left == []
    assert list(model.state_dict()) == keys
    assert_close(outputs_and_gradients(model, device), plain)


def test_only_what_is_worth_it_on_the_device(device: torch.device) -> None:
    model = build(FAMILY["llama"](), device)
    fused = fuse(model, device)
    assert bool(fused.fused) == (device.type == "npu")


def test_fused_operators_are_really_called(device: torch.device) -> None:
    if device.type != "npu":
        pytest.skip("only an NPU has fused operators")
    from torch_npu.simulation import op_counts

    model = build(FAMILY["llama"](), device)
    fuse(model, device)
    with op_counts() as counts:
        outputs_and_gradients(model, device)
    assert counts["npu::npu_rms_norm"] == 5
    assert counts["npu::npu_rotary_mul"] == 4
    assert counts["npu::npu_swiglu"] == 2


@pytest.mark.parametrize("operation", ALL)
def test_one_operation_alone(operation: Operation, device: torch.device) -> None:
    model = build(FAMILY["llama"](), device)
    plain = outputs_and_gradients(model, device)
    fused = fuse(model, device, [operation])
    assert {module.operation for module in fused.fused} == {operation}
    assert_close(outputs_and_gradients(model, device), plain)


def test_undo_restores_every_bit(device: torch.device) -> None:
    model = build(FAMILY["qwen3"](), device)
    plain = outputs_and_gradients(model, device)
    fused = fuse(model, device, ALL)
    assert any("forward" in vars(module) for module in model.modules())
    fused.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert fused.fused == []
    for again, before in zip(outputs_and_gradients(model, device), plain, strict=True):
        torch.testing.assert_close(again, before, rtol=0, atol=0)


def test_classes_and_other_models_are_not_touched(device: torch.device) -> None:
    import transformers.models.llama.modeling_llama as library

    forwards = {kind: kind.forward for kind in (LlamaAttention, LlamaMLP, LlamaRMSNorm)}
    other = build(FAMILY["llama"](), device)
    fuse(build(FAMILY["llama"](), device), device, ALL)
    assert all(kind.forward is forward for kind, forward in forwards.items())
    assert library.apply_rotary_pos_emb is apply_rotary_pos_emb
    assert not any("forward" in vars(module) for module in other.modules())


def test_a_copy_of_a_fused_model_is_fused_and_independent(device: torch.device) -> None:
    model = build(FAMILY["llama"](), device)
    fused = fuse(model, device, ALL)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert outputs_and_gradients(twin, device)[0].any()
    fused.undo()
    assert any("forward" in vars(module) for module in twin.modules())


def test_generation_with_cache(device: torch.device) -> None:
    model = build(FAMILY["llama-theta"](), device)
    ids = torch.arange(5, 13).reshape(1, 8).to(device)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options).tolist()
    fuse(model, device, ALL)
    assert model.generate(ids, **options).tolist() == plain


def test_llava_is_fused_in_its_language_model(device: torch.device) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=FAMILY["llama"](), vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).to(device)
    plain = outputs_and_gradients(model, device)
    fused = fuse(model, device, ALL)
    assert len(fused.fused) == 9
    assert all("language_model" in module.name for module in fused.fused)
    assert_close(outputs_and_gradients(model, device), plain)


def reasons(fused: FusedModules, operation: Operation) -> set[str]:
    return {module.reason for module in fused.left if module.operation == operation}


def test_look_alikes_are_left_with_a_reason(device: torch.device) -> None:
    """Gemma gates with GELU; and here is a norm that normalises nothing."""
    model = build(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), device)
    plain = outputs_and_gradients(model, device)
    norm = type("ScaledRMSNorm", (type(model.get_submodule("model.norm")),), {"forward": lambda self, x: 2 * x})
    model.get_submodule("model.norm").__class__ = norm
    fused = fuse(model, device, ALL)
    assert fused.count("swiglu") == 0
    assert reasons(fused, "rms_norm") == {"ScaledRMSNorm computes something else"}
    assert len(reasons(fused, "swiglu")) == 1
    assert "not SiLU" in reasons(fused, "swiglu").pop()
    model.get_submodule("model.norm").__class__ = norm.__base__
    assert_close(outputs_and_gradients(model, device), plain)


def test_scaled_angles_are_left_with_a_reason(device: torch.device) -> None:
    """YaRN multiplies cosines and sines by more than 1."""
    config = LlamaConfig(**rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))
    model = build(config, device)
    plain = outputs_and_gradients(model, device)
    fused = fuse(model, device, ALL)
    assert fused.count("rotary") == 0
    assert fused.count("rms_norm") == 5
    assert "model.rotary_emb scales" in reasons(fused, "rotary").pop()
    assert_close(outputs_and_gradients(model, device), plain)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**SIZES, rotary_pct=0.5),
        Phi3Config(**SIZES, num_key_value_heads=2, partial_rotary_factor=0.5),
    ],
    ids=["gpt-neox", "phi-3"],
)
def test_partial_rotation(config: PreTrainedConfig, device: torch.device) -> None:
    model = build(config, device)
    plain = outputs_and_gradients(model, device)
    assert fuse(model, device, ALL).count("rotary") == 2
    assert_close(outputs_and_gradients(model, device), plain)


def test_a_replaced_forward_is_not_overwritten(device: torch.device) -> None:
    model = build(FAMILY["llama"](), device)
    norm = model.get_submodule("model.norm")
    hooked = norm.forward
    norm.forward = lambda hidden_states: hooked(hidden_states)
    replaced = norm.forward
    fused = fuse(model, device, ALL)
    assert norm.forward is replaced
    assert "already replaced" in reasons(fused, "rms_norm").pop()


def test_fusing_draws_no_random_numbers(device: torch.device) -> None:
    model = build(FAMILY["llama"](), device)
    before = torch.get_rng_state()
    fuse(model, device, ALL)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rms_norm(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    module = LlamaRMSNorm(24, eps=1e-3)
    torch.nn.init.normal_(module.weight)
    module = module.to(device, dtype)
    hidden = torch.randn(2, 5, 24).to(device, dtype).requires_grad_()
    ours, theirs = rms_norm(hidden, module.weight, 1e-3), module(hidden)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    check_gradients(ours, theirs, [hidden, module.weight], tolerance)


def test_an_npus_rms_norm_takes_a_float32_weight(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, weights are float32 and activations are not; Atlas A2 and A3 take both in one call."""
    if device.type != "npu":
        pytest.skip("an operator of NPUs")
    import torch_npu

    operator, calls = torch_npu.npu_rms_norm, []

    def recorded(hidden: torch.Tensor, weight: torch.Tensor, *more: Any) -> Any:
        calls.append((hidden.dtype, weight.dtype))
        return operator(hidden, weight, *more)

    monkeypatch.setattr(torch_npu, "npu_rms_norm", recorded)
    hidden, weight = torch.randn(2, 5, 24, dtype=torch.bfloat16).to(device), torch.randn(24).to(device)
    out = rms_norm(hidden, weight, 1e-3)
    assert calls == [(torch.bfloat16, torch.float32)]
    assert out.dtype == torch.float32
    expected = torch.nn.functional.rms_norm(hidden.cpu().double(), (24,), weight.cpu().double(), 1e-3)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("positions", [1, 2], ids=["shared", "per-row"])
def test_rotary(unsqueeze_dim: int, positions: int, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    shape = (2, 4, 7, 16) if unsqueeze_dim == 1 else (2, 7, 4, 16)
    query = torch.randn(shape).to(device, dtype).requires_grad_()
    key = torch.randn(shape).narrow(unsqueeze_dim, 0, 2).to(device, dtype).requires_grad_()
    angles = torch.rand(positions, 7, 8).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    ours = apply_rotary(query, key, cos, sin, unsqueeze_dim)
    theirs = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim)
    for a, b, leaf in zip(ours, theirs, (query, key), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        check_gradients(a, b, [leaf], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_offset_rms_norm(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    module = Gemma2RMSNorm(24, eps=1e-3)
    torch.nn.init.normal_(module.weight)
    module = module.to(device, dtype)
    hidden = torch.randn(2, 5, 24).to(device, dtype).requires_grad_()
    ours, theirs = offset_rms_norm(hidden, module.weight, 1e-3), module(hidden)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    check_gradients(ours, theirs, [hidden, module.weight], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [1, 2], ids=["packed", "per-row"])
def test_neighbour_rotary(rows: int, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """GLM's: half of each head, of angles in the half-split arrangement."""
    query = torch.randn(rows, 4, 7, 16).to(device, dtype).requires_grad_()
    key = torch.randn(rows, 2, 7, 16).to(device, dtype).requires_grad_()
    angles = torch.rand(rows, 7, 4).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    ours = apply_repeated_neighbour_rotary(query, key, cos, sin)
    theirs = glm_rotary(query, key, cos, sin)
    for a, b, leaf in zip(ours, theirs, (query, key), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        check_gradients(a, b, [leaf], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    gate = torch.randn(2, 3, 12).to(device, dtype).requires_grad_()
    value = torch.randn(2, 3, 12).to(device, dtype).requires_grad_()
    ours, theirs = swiglu(gate, value), torch.nn.functional.silu(gate) * value
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    check_gradients(ours, theirs, [gate, value], tolerance)


def check_gradients(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor], tolerance: float) -> None:
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours)
    pairs = zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def test_autocast_keeps_the_model_running(device: torch.device) -> None:
    """Under autocast, norms see float32 and angles differ in type from what they rotate."""
    model = build(FAMILY["qwen3"](), device)
    ids = torch.arange(5, 25).reshape(1, 20).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.float()
        fuse(model, device, ALL)
        fused = model(input_ids=ids, use_cache=False).logits.float()
    assert (fused - plain).norm() / plain.norm() < 3e-2
