"""How a reference implementation becomes an operator: `torch.ops.npu.<name>` with its real schema."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_npu import _C
from torch_npu.simulation import recording

FLOATING = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.float16, torch.bfloat16)
UNLIMITED = 2147483647  # the schemas' "no limit" for a number of tokens

SCHEMAS: dict[str, str] = {}  # operator name -> schema as registered, for the comparison with the real wheel

_library = torch.library.Library("npu", "DEF")


class RejectedCallError(RuntimeError):
    """A call that the real operator refuses, or would not compute as meant."""


def require(condition: bool, operator: str, message: str) -> None:
    if not condition:
        raise RejectedCallError(f"{operator}: {message} [simulated NPU]")


def require_unused(operator: str, arguments: Mapping[str, Any]) -> None:
    """Refuses options that are not simulated, so that no test passes on arithmetic that never took place."""
    for name, value in arguments.items():
        require(value is None, operator, f"{name} is not simulated")


def require_npu(operator: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.device.type == "npu",
            operator,
            f"{name} must be an NPU tensor, it is on {'' if tensor is None else tensor.device}",
        )


def require_dtype(operator: str, dtypes: tuple[torch.dtype, ...], **tensors: torch.Tensor) -> None:
    """All tensors must have one dtype, which must be among `dtypes`."""
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    require(len(set(found.values())) == 1, operator, f"dtypes must be equal, got {found}")
    (dtype,) = set(found.values())
    require(dtype in dtypes, operator, f"dtype must be one of {dtypes}, got {dtype}")


def fused_operator(
    schema: str, held_outputs: tuple[int, ...] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the operator of `schema`; returns what users call as `torch_npu.<name>`.

    The function is composed of differentiable torch operators, so autograd needs no formula of ours. With
    `held_outputs`, what lies between its inputs and outputs is not kept for the backward pass but computed again there:
    as on hardware, a fused operator of training holds its inputs and those of its outputs, named by position.
    """

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        signature = inspect.signature(reference)
        _library.define(schema)
        SCHEMAS[name] = schema

        @functools.wraps(reference)
        def quietly(*args: Any, **kwargs: Any) -> Any:
            counting = _C.set_counting(False)
            try:
                with torch.autocast("npu", enabled=False):  # the real kernel takes the dtypes it is given
                    return reference(*args, **kwargs)
            finally:
                _C.set_counting(counting)

        @functools.wraps(reference)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
            learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
            if (
                held_outputs is None or not learns or given.get("keep_prob", 1) < 1
            ):  # dropout could not be computed again alike
                return quietly(*args, **kwargs)

            names = tuple(tensors)
            options = {key: value for key, value in given.items() if key not in tensors}

            def run(*inputs: torch.Tensor) -> Any:  # refers to no tensor: what is held is held by autograd alone
                return quietly(**options, **dict(zip(names, inputs, strict=True)))

            return _HeldAsOnHardware.apply(run, held_outputs, *tensors.values())

        _library.impl(name, kernel, "CompositeImplicitAutograd")

        @functools.wraps(reference)
        def call(*args: Any, **kwargs: Any) -> Any:
            recording.record(name, args, kwargs)
            _C.count_op(f"npu::{name}")
            _refuse_device_lengths(name, schema, args, kwargs)
            return getattr(torch.ops.npu, name)(*args, **kwargs)

        return call

    return register


class _HeldAsOnHardware(torch.autograd.Function):
    """Runs a reference, and runs it again for its gradients; between, only what the real operator holds is held."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], held_outputs: tuple[int, ...], *inputs: torch.Tensor) -> Any:
        out = run(*inputs)
        ctx.run = run
        ctx.save_for_backward(*inputs, *(out[position] for position in held_outputs))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=False)
        ]
        learning = [tensor for tensor in inputs if tensor.requires_grad]
        counting = _C.set_counting(False)
        try:
            with torch.enable_grad():
                out = ctx.run(*inputs)
            pairs = [
                (output, gradient)
                for output, gradient in zip(out if isinstance(out, tuple) else (out,), gradients, strict=True)
                if isinstance(output, torch.Tensor) and output.requires_grad and gradient is not None
            ]
            found = iter(torch.autograd.grad([o for o, _ in pairs], learning, [g for _, g in pairs], allow_unused=True))
        finally:
            _C.set_counting(counting)
        return (None, None, *(next(found) if tensor.requires_grad else None for tensor in inputs))


def _refuse_device_lengths(name: str, schema: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A sequence length is a number on the host: reading it from a tensor would drain the device at every layer."""
    parsed = torch._C.parse_schema(schema)
    given = dict(zip((argument.name for argument in parsed.arguments), args, strict=False)) | dict(kwargs)
    for argument in parsed.arguments:
        value = given.get(argument.name)
        if "List[" not in str(argument.type) or value is None:
            continue
        is_tensor = isinstance(value, torch.Tensor) or any(isinstance(item, torch.Tensor) for item in value)
        require(not is_tensor, name, f"{argument.name} must be a list of int on the host, got tensors")
