"""How a reference implementation becomes an operator: `torch.ops.npu.<name>` with its real schema."""

from __future__ import annotations

import functools
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


def fused_operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the operator of `schema`; returns what users call as `torch_npu.<name>`.

    The function is composed of differentiable torch operators, so autograd needs no formula of ours.
    """

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _library.define(schema)
        SCHEMAS[name] = schema

        @functools.wraps(reference)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            counting = _C.set_counting(False)
            try:
                with torch.autocast("npu", enabled=False):  # the real kernel takes the dtypes it is given
                    return reference(*args, **kwargs)
            finally:
                _C.set_counting(counting)

        _library.impl(name, kernel, "CompositeImplicitAutograd")

        @functools.wraps(reference)
        def call(*args: Any, **kwargs: Any) -> Any:
            recording.record(name, args, kwargs)
            _C.count_op(f"npu::{name}")
            _refuse_device_lengths(name, schema, args, kwargs)
            return getattr(torch.ops.npu, name)(*args, **kwargs)

        return call

    return register


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
