"""Every operation of `llava_npu.ops` compared with its textbook formula, on small inputs that take all of its paths.

The formulas are written out here, in float64 and without any of the code they check. `real_sizes` has the shapes that
models really compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def compare_operations(cases: Iterable[Operation], device: torch.device, dtype: torch.dtype) -> Iterator[Comparison]:
    """Outputs and gradients of operations on `device` in `dtype`, compared with float64 on the CPU."""
    for operation in cases:
        yield from compare(operation, device, dtype, expected(operation, dtype))


def expected(operation: Operation, dtype: torch.dtype) -> Tensors:
    """Output and gradients by the formula, of inputs that are rounded to `dtype`."""
    # Both start from the same rounded numbers, so that only the device's arithmetic is compared.
    inputs = {name: tensor.to(dtype).double() for name, tensor in operation.inputs.items()}
    return _run(operation.reference, inputs, operation.differentiable)


def compare(operation: Operation, device: torch.device, dtype: torch.dtype, wanted: Tensors) -> Iterator[Comparison]:
    """The output and gradients of one operation on `device`, compared with those `expected`."""
    limits, problem = LIMITS["operation", dtype], ""
    inputs = {name: tensor.to(dtype).to(device) for name, tensor in operation.inputs.items()}
    try:
        actual = _run(operation.compute, inputs, operation.differentiable)
    except Exception as error:  # noqa: BLE001  a device fails in whatever way it likes; that is the finding
        actual, problem = {}, f"{type(error).__name__}: {error}"
    for name, tensor in wanted.items():
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
    # Any numbers will do for the gradient from above, if they are the same in every type and do not cancel.
    above = random_tensor(output.numel()).reshape(output.shape).bfloat16().to(output)
    (output * above).sum().backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), **gradients}


def operations() -> Iterator[Operation]:
    """All operations, each on all of its paths."""
    heads = (_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM)
    yield packed("causal", _LENGTHS, heads, causal=True)
    yield packed("bidirectional", _LENGTHS, heads, causal=False)
    yield packed("sliding window", _LENGTHS, heads, causal=True, window=3)
    yield batched("causal", length=7, key_length=7, causal=True)
    yield batched("bidirectional", length=7, key_length=7, causal=False)
    yield batched("prompt, no gradients", length=7, key_length=7, causal=True, training=False)
    yield batched("chunk behind a cache", length=3, key_length=9, causal=True, training=False)
    yield batched("one token behind a cache", length=1, key_length=9, causal=True, training=False)
    yield _masked()
    yield _multihead_attention()
    yield normed("", 3, 5, 64)
    yield _rotary()
    yield gated("", 3, 5, 64)
    yield _linear_cross_entropy()


def packed(
    case: str, lengths: Sequence[int], heads: tuple[int, int, int], causal: bool, window: int | None = None
) -> Operation:
    """`packed_attention`; `heads` are those of queries, those of keys, and their dimension."""
    num_heads, key_value_heads, head_dim = heads
    tokens = sum(lengths)

    def reference(x: Tensors) -> torch.Tensor:
        outputs = []
        for rows in zip(*(x[part].split(tuple(lengths)) for part in ("query", "key", "value")), strict=True):
            q, k, v = (each.transpose(0, 1)[None] for each in rows)
            allowed = may_attend(q.shape[2], q.shape[2], causal, window)
            outputs.append(attention(q, k, v, allowed)[0].transpose(0, 1))
        return torch.cat(outputs)

    return Operation(
        "packed_attention",
        case,
        {
            "query": random_tensor(tokens, num_heads, head_dim),
            "key": random_tensor(tokens, key_value_heads, head_dim, seed=1),
            "value": random_tensor(tokens, key_value_heads, head_dim, seed=2),
        },
        lambda x: packed_attention(x["query"], x["key"], x["value"], lengths, causal, window=window),
        reference,
    )


def batched(
    case: str,
    length: int,
    key_length: int,
    causal: bool,
    training: bool = True,
) -> Operation:
    """`batched_attention`, small."""
    inputs = attention_inputs(length, key_length, (_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM))
    return batched_on(case, inputs, causal, training)


def batched_on(case: str, inputs: Tensors, causal: bool, training: bool) -> Operation:
    """`batched_attention` of these inputs."""
    allowed = may_attend(inputs["query"].shape[2], inputs["key"].shape[2], causal, None)
    return Operation(
        "batched_attention",
        case,
        inputs,
        lambda x: batched_attention(x["query"], x["key"], x["value"], causal),
        lambda x: attention(x["query"], x["key"], x["value"], allowed),
        training,
    )


def _masked() -> Operation:
    length, key_length = 5, 8
    mask = torch.rand(2, 1, length, key_length, generator=_generator(length)) < 0.5
    mask[0, 0, 1] = False  # a query that sees nothing gives zeros
    mask[1, 0, :, 0] = True
    return masked(
        "with a blind query", attention_inputs(length, key_length, (_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM)), mask
    )


def masked(case: str, inputs: Tensors, mask: torch.Tensor, training: bool = True) -> Operation:
    """`masked_attention` of these inputs."""
    return Operation(
        "masked_attention",
        case,
        inputs,
        lambda x: masked_attention(x["query"], x["key"], x["value"], mask.to(x["query"].device)),
        lambda x: attention(x["query"], x["key"], x["value"], mask),
        training,
    )


def normed(case: str, *shape: int) -> Operation:
    """`rms_norm`."""
    return Operation(
        "rms_norm",
        case,
        {"hidden": random_tensor(*shape), "weight": 1 + 0.1 * random_tensor(shape[-1])},
        lambda x: rms_norm(x["hidden"], x["weight"], 1e-5),
        lambda x: x["weight"] * x["hidden"] / (x["hidden"].square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    )


def gated(case: str, *shape: int) -> Operation:
    """`swiglu`."""
    return Operation(
        "swiglu",
        case,
        {"gate": random_tensor(*shape), "value": random_tensor(*shape, seed=1)},
        lambda x: swiglu(x["gate"], x["value"]),
        lambda x: x["gate"] / (1 + (-x["gate"]).exp()) * x["value"],
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
        {"input": random_tensor(2, 6, width), **weights},
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
            "query": random_tensor(2, _HEADS, length, _HEAD_DIM),
            "key": random_tensor(2, _KEY_VALUE_HEADS, length, _HEAD_DIM),
        },
        compute,
        lambda x: torch.cat((rotate(x["query"]), rotate(x["key"])), 1),
    )


def _linear_cross_entropy() -> Operation:
    labels = torch.tensor([5, -100, 0, 36, -100, 12, 3, 3, 20, -100])
    return Operation(
        "linear_cross_entropy",
        "",
        {"hidden": random_tensor(len(labels), 32), "weight": 0.3 * random_tensor(37, 32)},
        lambda x: linear_cross_entropy(x["hidden"], x["weight"], labels.to(x["hidden"].device), chunk_size=4),
        lambda x: F.cross_entropy(x["hidden"] @ x["weight"].T, labels, reduction="sum"),
    )


def attention_inputs(length: int, key_length: int, heads: tuple[int, int, int], batch: int = 2) -> Tensors:
    """Queries (batch, heads, length, head_dim), keys and values; `heads` as for `packed`."""
    num_heads, key_value_heads, head_dim = heads
    return {
        "query": random_tensor(batch, num_heads, length, head_dim),
        "key": random_tensor(batch, key_value_heads, key_length, head_dim, seed=1),
        "value": random_tensor(batch, key_value_heads, key_length, head_dim, seed=2),
    }


def may_attend(length: int, key_length: int, causal: bool, window: int | None) -> torch.Tensor:
    """(length, key_length), aligned at the end."""
    queries = torch.arange(length)[:, None] + key_length - length
    keys = torch.arange(key_length)
    allowed = torch.ones(length, key_length, dtype=torch.bool)
    if causal:
        allowed &= keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    return allowed


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax attention written out; (batch, heads, length, head_dim)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.exp() * allowed
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers from N(0, 1) in float64, the same on every machine."""
    return torch.randn(*shape, generator=_generator(1000 * seed + sum(shape)), dtype=torch.float64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
