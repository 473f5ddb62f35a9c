"""Reference: torch's own `nn.MultiheadAttention` with the same weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from llava_npu.ops.multihead_attention import FusedMultiheadAttention

BATCH, LENGTH, KEYS, WIDTH, HEADS = 3, 5, 7, 16, 4
TOLERANCE = 1e-6

CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "other-widths": {"kdim": 12, "vdim": 10},
    "bias-kv": {"add_bias_kv": True},
    "zero-attention": {"add_zero_attn": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "vdim": 10},
}


def pair(device: torch.device, **options: Any) -> tuple[FusedMultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = FusedMultiheadAttention(WIDTH, HEADS, **options)
    ours.load_state_dict(reference.state_dict())
    return ours.to(device), reference.to(device)


def cross_inputs(device: torch.device, batch_first: bool, kdim: int = WIDTH, vdim: int = WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(BATCH, LENGTH, WIDTH), (BATCH, KEYS, kdim), (BATCH, KEYS, vdim)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x if batch_first else x.transpose(0, 1)).to(device) for x in inputs]


def masks(kind: str, device: torch.device, length: int = LENGTH, keys: int = KEYS) -> dict[str, torch.Tensor]:
    """Masks of every kind; no row is masked whole."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(length, keys, generator=generator) < 0.4
    hidden[:, 0] = False
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[0, -2:] = padding[2, -3:] = True
    per_head = torch.rand(BATCH * HEADS, length, keys, generator=generator) < 0.4
    per_head[..., 0] = False
    bias = torch.randn(length, keys, generator=generator)
    minus_infinity = torch.zeros(BATCH, keys).masked_fill(padding, float("-inf"))
    chosen = {
        "none": {},
        "attention": {"attn_mask": hidden},
        "per-head": {"attn_mask": per_head},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "bias": {"attn_mask": bias},
        "bias-and-padding": {"attn_mask": bias, "key_padding_mask": minus_infinity},
    }[kind]
    return {name: mask.to(device) for name, mask in chosen.items()}


MASKS = ["none", "attention", "per-head", "padding", "both", "bias", "bias-and-padding"]


def assert_same(
    ours: nn.Module, reference: nn.Module, inputs: list[torch.Tensor], tolerance: float, **options: Any
) -> None:
    """Outputs, weights, and the gradients of inputs and parameters."""
    results = []
    for module in (ours, reference):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        module.zero_grad()
        out, weights = module(*(leaves * 3 if len(leaves) == 1 else leaves), **options)
        loss = (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum()
        if weights is not None:
            loss = loss + weights.square().sum()
        loss.backward()
        parameters = dict(module.named_parameters())
        results.append((out, weights, [leaf.grad for leaf in leaves], {k: p.grad for k, p in parameters.items()}))
    (out, weights, grads, parameter_grads), (out_, weights_, grads_, parameter_grads_) = results
    torch.testing.assert_close(out, out_, rtol=tolerance, atol=tolerance)
    assert (weights is None) == (weights_ is None)
    if weights_ is not None:
        torch.testing.assert_close(weights, weights_, rtol=tolerance, atol=tolerance)
    for a, b in itertools.chain(zip(grads, grads_, strict=True), zip_by_name(parameter_grads, parameter_grads_)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1, b.abs().max().item()))


def zip_by_name(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[Any, Any]]:
    assert first.keys() == second.keys()
    return [(first[name], second[name]) for name in second]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_cross_attention(constructor: str, kind: str, need_weights: bool, device: torch.device) -> None:
    options = CONSTRUCTORS[constructor]
    ours, reference = pair(device, batch_first=True, **options)
    inputs = cross_inputs(device, True, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    assert_same(ours, reference, inputs, TOLERANCE, need_weights=need_weights, **masks(kind, device))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention(batch_first: bool, kind: str, need_weights: bool, device: torch.device) -> None:
    ours, reference = pair(device, batch_first=batch_first)
    inputs = cross_inputs(device, batch_first)[:1]
    options = masks(kind, device, keys=LENGTH)
    assert_same(ours, reference, inputs, TOLERANCE, need_weights=need_weights, **options)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_unbatched(average: bool, need_weights: bool, device: torch.device) -> None:
    ours, reference = pair(device)
    inputs = [tensor[0] for tensor in cross_inputs(device, True)]
    padding = torch.arange(KEYS, device=device) > 4
    options = {"need_weights": need_weights, "average_attn_weights": average, "key_padding_mask": padding}
    assert_same(ours, reference, inputs, TOLERANCE, **options)


@pytest.mark.parametrize("average", [False, True])
def test_weights_per_head(average: bool, device: torch.device) -> None:
    ours, reference = pair(device, batch_first=True)
    options = {"average_attn_weights": average, **masks("both", device)}
    assert_same(ours, reference, cross_inputs(device, True), TOLERANCE, **options)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("with_padding", [False, True])
def test_causal_hint(with_padding: bool, need_weights: bool, device: torch.device) -> None:
    ours, reference = pair(device, batch_first=True)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if with_padding:
        options["key_padding_mask"] = torch.arange(LENGTH, device=device).expand(BATCH, -1) > 3
    assert_same(ours, reference, cross_inputs(device, True)[:1], TOLERANCE, **options)


def test_keys_and_initial_weights_are_torchs() -> None:
    for options in CONSTRUCTORS.values():
        torch.manual_seed(3)
        reference = nn.MultiheadAttention(WIDTH, HEADS, **options).state_dict()
        torch.manual_seed(3)
        ours = FusedMultiheadAttention(WIDTH, HEADS, **options).state_dict()
        assert list(ours) == list(reference)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, reference[name], rtol=0, atol=0)


def test_the_output_projection_is_applied_and_trained(device: torch.device) -> None:
    ours, _ = pair(device, batch_first=True)
    query = cross_inputs(device, True)[0]
    before = ours(query, query, query, need_weights=False)[0]
    before.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in ours.out_proj.parameters())
    with torch.no_grad():
        ours.out_proj.weight.zero_()
        ours.out_proj.bias.fill_(2.0)
    assert torch.equal(ours(query, query, query, need_weights=False)[0], torch.full_like(before, 2.0))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_a_query_with_everything_masked_gives_zeros(additive: bool, need_weights: bool, device: torch.device) -> None:
    ours, _ = pair(device, batch_first=True)
    inputs = [tensor.requires_grad_() for tensor in cross_inputs(device, True)]
    mask = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    mask[1] = True
    if additive:
        mask = torch.zeros(BATCH, KEYS).masked_fill(mask, float("-inf"))
    out, _ = ours(*inputs, key_padding_mask=mask.to(device), need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(LENGTH, -1))
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs)
    assert inputs[0].grad is not None
    assert not inputs[0].grad[1].any()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_dropout_is_a_probability_of_dropping(dropout: float, need_weights: bool, device: torch.device) -> None:
    """Keys of zero give even weights; values of one then make each head's output (kept share) / (1 − dropout)."""
    length = 256
    module = FusedMultiheadAttention(8, 8, dropout=dropout, bias=False, batch_first=True).to(device)
    with torch.no_grad():
        module.in_proj_weight.zero_()
        module.in_proj_weight[16:].copy_(torch.eye(8))
        module.out_proj.weight.copy_(torch.eye(8))
    ones = torch.ones(1, length, 8, device=device)
    torch.manual_seed(0)
    out = module(ones, ones, ones, need_weights=need_weights)[0].cpu()
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert out.var().item() == pytest.approx(dropout / (1 - dropout) / length, rel=0.15)
    module.eval()
    torch.testing.assert_close(module(ones, ones, ones, need_weights=need_weights)[0], ones)


def test_dropout_draws_torchs_numbers() -> None:
    """With weights asked for, the same seed drops the same weights."""
    ours, reference = pair(torch.device("cpu"), batch_first=True, dropout=0.4)
    inputs = cross_inputs(torch.device("cpu"), True)
    outs = []
    for module in (ours, reference):
        torch.manual_seed(5)
        outs.append(module(*inputs)[0])
    torch.testing.assert_close(*outs, rtol=TOLERANCE, atol=TOLERANCE)


def test_inside_a_transformer_layer(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True).to(device)
    query = cross_inputs(device, True)[0]
    expected = layer(query)
    fused = FusedMultiheadAttention(WIDTH, HEADS, batch_first=True).to(device)
    fused.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = fused
    torch.testing.assert_close(layer(query), expected, rtol=1e-5, atol=1e-5)


def test_half_precision(device: torch.device) -> None:
    ours, reference = pair(device, batch_first=True)
    expected = reference(*cross_inputs(device, True), need_weights=False)[0]
    halves = [tensor.bfloat16() for tensor in cross_inputs(device, True)]
    with torch.no_grad():
        out = ours.bfloat16()(*halves, need_weights=False)[0]
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() / expected.norm() < 2e-2


def test_wrong_arguments_are_named() -> None:
    ours, _ = pair(torch.device("cpu"), batch_first=True)
    inputs = cross_inputs(torch.device("cpu"), True)
    with pytest.raises(ValueError, match="is_causal says what attn_mask is"):
        ours(*inputs, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask has shape \(5, 5\); allowed are \(5, 7\) and \(12, 5, 7\)"):
        ours(*inputs, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(3, 5\), not \(3, 7\)"):
        ours(*inputs, key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask is of torch\.int64; allowed are torch\.bool"):
        ours(*inputs, attn_mask=torch.zeros(5, 7, dtype=torch.long))
    query, key, value = inputs
    with pytest.raises(ValueError, match=rf"query has shape \(3, 5, 1\); .* width {WIDTH}"):
        ours(query[..., :1], key, value)
    with pytest.raises(ValueError, match=r"key has shape \(3, 7, .* of one length"):
        ours(query, key, value[:, :-1])
    with pytest.raises(ValueError, match=r"value has shape .* 3 dimensions, as query"):
        ours(query, key, value[0])
    nested = torch.nested.nested_tensor([torch.zeros(2, WIDTH), torch.zeros(3, WIDTH)], layout=torch.jagged)
    with pytest.raises(ValueError, match="nested tensors are not supported"):
        ours(nested, nested, nested)
