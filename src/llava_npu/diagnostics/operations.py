"""Every operation of `llava_npu.ops` compared with its textbook formula, on small inputs that take all of its paths.

The formulas are written out here, in float64 and without any of the code they check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from llava_npu.diagnostics.comparison import LIMITS, Comparison, Stage, relative_error, short
from llava_npu.ops.attention import batched_attention, masked_attention, packed_attention
from llava_npu.ops.linear_cross_entropy import linear_cross_entropy
from llava_npu.ops.multihead_attention import FusedMultiheadAttention
from llava_npu.ops.rms_norm import rms_norm
from llava_npu.ops.rotary import apply_rotary
from llava_npu.ops.swiglu import swiglu

Tensors = dict[str, torch.Tensor]
_LENGTHS = (9, 1, 6)
_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM = 4, 2, 16


@dataclass(frozen=True)
class Operation:
    """One way to call an operation.

    Attributes:
        name: the function's or class's.
        case: how it is called, or "".
        inputs: float64 on the CPU; each gets a gradient.
        compute: the operation, on any device and dtype.
        reference: the formula, in float64.
        differentiable: whether it is called in training; else without gradients, as in generation.
    """

    name: str
    case: str
    inputs: Tensors
    compute: Callable[[Tensors], torch.Tensor]
    reference: Callable[[Tensors], torch.Tensor]
    differentiable: bool = True


def compare_operations(device: torch.device, dtype: torch.dtype) -> Iterator[Comparison]:
    """Outputs and gradients of every operation on `device` in `dtype`, compared with float64 on the CPU."""
    for operation in operations():
        yield from _compare(operation, device, dtype)


def _compare(operation: Operation, device: torch.device, dtype: torch.dtype) -> Iterator[Comparison]:
    # Both start from the same rounded numbers, so that only the device's arithmetic is compared.
    rounded = {name: tensor.to(dtype) for name, tensor in operation.inputs.items()}
    expected = _run(
        operation.reference, {name: tensor.double() for name, tensor in rounded.items()}, operation.differentiable
    )
    limits, problem = LIMITS["operation", dtype], ""
    try:
        actual = _run(
            operation.compute, {name: tensor.to(device) for name, tensor in rounded.items()}, operation.differentiable
        )
    except Exception as error:  # noqa: BLE001  a device fails in whatever way it likes; that is the finding
        actual, problem = {}, f"{type(error).__name__}: {error}"
    for name, tensor in expected.items():
        stage: Stage = "forward" if name == "output" else "gradient"
        yield Comparison(
            kind="operation",
            subject=operation.name,
            part=operation.case,
            stage=stage,
            quantity=name,
            dtype=short(dtype),
            error=relative_error(actual[name], tensor) if name in actual else math.inf,
            limit=limits[stage],
            problem=problem,
        )


def _run(function: Callable[[Tensors], torch.Tensor], inputs: Tensors, differentiable: bool) -> Tensors:
    """The output, and the gradient of each input."""
    if not differentiable:
        with torch.no_grad():
            return {"output": function(inputs)}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output = function(leaves)
    # Any fixed numbers will do for the gradient from above, but not ones: softmax's gradient of those is zero.
    above = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(output)
    (output * above).sum().backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output, **gradients}


def operations() -> Iterator[Operation]:
    """All cases."""
    yield _packed("causal", causal=True)
    yield _packed("bidirectional", causal=False)
    yield _packed("sliding window", causal=True, window=3)
    yield _batched("causal", length=7, key_length=7, causal=True)
    yield _batched("bidirectional", length=7, key_length=7, causal=False)
    yield _batched("prompt, no gradients", length=7, key_length=7, causal=True, training=False)
    yield _batched("chunk behind a cache", length=3, key_length=9, causal=True, training=False)
    yield _batched("one token behind a cache", length=1, key_length=9, causal=True, training=False)
    yield _masked()
    yield _multihead_attention()
    yield Operation(
        "rms_norm",
        "",
        {"hidden": _random(3, 5, 64), "weight": 1 + 0.1 * _random(64)},
        lambda x: rms_norm(x["hidden"], x["weight"], 1e-5),
        lambda x: x["weight"] * x["hidden"] / (x["hidden"].square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    )
    yield _rotary()
    yield Operation(
        "swiglu",
        "",
        {"gate": _random(3, 5, 64), "value": _random(3, 5, 64)},
        lambda x: swiglu(x["gate"], x["value"]),
        lambda x: x["gate"] / (1 + (-x["gate"]).exp()) * x["value"],
    )
    yield _linear_cross_entropy()


def _packed(case: str, causal: bool, window: int | None = None) -> Operation:
    starts = [sum(_LENGTHS[:number]) for number in range(len(_LENGTHS))]

    def reference(x: Tensors) -> torch.Tensor:
        outputs = []
        for start, length in zip(starts, _LENGTHS, strict=True):
            rows = slice(start, start + length)
            q, k, v = (x[part][rows].transpose(0, 1)[None] for part in ("query", "key", "value"))
            outputs.append(_attention(q, k, v, _may_attend(length, length, causal, window))[0].transpose(0, 1))
        return torch.cat(outputs)

    tokens = sum(_LENGTHS)
    return Operation(
        "packed_attention",
        case,
        {
            "query": _random(tokens, _HEADS, _HEAD_DIM),
            "key": _random(tokens, _KEY_VALUE_HEADS, _HEAD_DIM),
            "value": _random(tokens, _KEY_VALUE_HEADS, _HEAD_DIM),
        },
        lambda x: packed_attention(x["query"], x["key"], x["value"], _LENGTHS, causal, window=window),
        reference,
    )


def _batched(case: str, length: int, key_length: int, causal: bool, training: bool = True) -> Operation:
    return Operation(
        "batched_attention",
        case,
        _attention_inputs(length, key_length),
        lambda x: batched_attention(x["query"], x["key"], x["value"], causal),
        lambda x: _attention(x["query"], x["key"], x["value"], _may_attend(length, key_length, causal, None)),
        training,
    )


def _masked() -> Operation:
    length, key_length = 5, 8
    mask = torch.rand(2, 1, length, key_length, generator=_generator(length)) < 0.5
    mask[0, 0, 1] = False  # a query that sees nothing gives zeros
    mask[1, 0, :, 0] = True
    return Operation(
        "masked_attention",
        "with a blind query",
        _attention_inputs(length, key_length),
        lambda x: masked_attention(x["query"], x["key"], x["value"], mask.to(x["query"].device)),
        lambda x: _attention(x["query"], x["key"], x["value"], mask),
    )


def _multihead_attention() -> Operation:
    width, heads = 64, 4
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {
            name: 3 * value.detach().double() for name, value in nn.MultiheadAttention(width, heads).named_parameters()
        }

    def run(module: nn.Module, x: Tensors) -> torch.Tensor:
        module = module.to(x["input"])
        arguments = (x["input"],) * 3
        options = {"key_padding_mask": padding.to(x["input"].device), "need_weights": False}
        parameters = {name: x[name] for name in weights}
        out: torch.Tensor = torch.func.functional_call(module, parameters, arguments, options)[0]
        return out

    return Operation(
        "FusedMultiheadAttention",
        "padded keys",
        {"input": _random(2, 6, width), **weights},
        lambda x: run(FusedMultiheadAttention(width, heads, batch_first=True), x),
        lambda x: run(nn.MultiheadAttention(width, heads, batch_first=True), x),
    )


def _rotary() -> Operation:
    length = 6
    frequencies = 10000.0 ** -(torch.arange(0, _HEAD_DIM, 2, dtype=torch.float64) / _HEAD_DIM)
    angles = torch.arange(length)[:, None] * frequencies.repeat(2)  # (length, head_dim)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        # The angles are inputs too, and rounded like any other.
        cos, sin = angles.cos(), angles.sin()
        return x * cos + torch.cat((-second, first), -1) * sin

    def compute(x: Tensors) -> torch.Tensor:
        cos, sin = (angle[None].to(x["query"]) for angle in (angles.cos(), angles.sin()))
        return torch.cat(apply_rotary(x["query"], x["key"], cos, sin), 1)

    return Operation(
        "apply_rotary",
        "",
        {
            "query": _random(2, _HEADS, length, _HEAD_DIM),
            "key": _random(2, _KEY_VALUE_HEADS, length, _HEAD_DIM),
        },
        compute,
        lambda x: torch.cat((rotate(x["query"]), rotate(x["key"])), 1),
    )


def _linear_cross_entropy() -> Operation:
    labels = torch.tensor([5, -100, 0, 36, -100, 12, 3, 3, 20, -100])
    return Operation(
        "linear_cross_entropy",
        "",
        {"hidden": _random(len(labels), 32), "weight": 0.3 * _random(37, 32)},
        lambda x: linear_cross_entropy(x["hidden"], x["weight"], labels.to(x["hidden"].device), chunk_size=4),
        lambda x: F.cross_entropy(x["hidden"] @ x["weight"].T, labels, reduction="sum"),
    )


def _attention_inputs(length: int, key_length: int) -> Tensors:
    return {
        "query": _random(2, _HEADS, length, _HEAD_DIM),
        "key": _random(2, _KEY_VALUE_HEADS, key_length, _HEAD_DIM),
        "value": _random(2, _KEY_VALUE_HEADS, key_length, _HEAD_DIM),
    }


def _may_attend(length: int, key_length: int, causal: bool, window: int | None) -> torch.Tensor:
    """(length, key_length), aligned at the end."""
    queries = torch.arange(length)[:, None] + key_length - length
    keys = torch.arange(key_length)
    allowed = torch.ones(length, key_length, dtype=torch.bool)
    if causal:
        allowed &= keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    return allowed


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax attention written out; (batch, heads, length, head_dim)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.exp() * allowed
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator(sum(shape)), dtype=torch.float64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
