"""Puts fused operations into a built model, module by module, and takes them out again.

Only instances are touched: each fused module gets a `forward` of its own, while classes, library modules, parameters
and state-dict keys stay as they were. Nothing is chosen by a list of class names. A module is fused if its class's own
forward, tried on small random numbers, computes what the fused operation computes; so Llama, Mistral, Qwen and
similar models are all fused, and a look-alike (Gemma's norm multiplies by one plus the weight) is left alone, with the
reason.

Rotary embedding is not a module but a function that attention calls by name. An attention's class forward is therefore
copied with that one name bound to the fused function. Angles come from the model as before, so that its base
(`rope_theta`) and its scaling are kept.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from llava_npu.ops import kernels
from llava_npu.ops.rms_norm import rms_norm
from llava_npu.ops.rotary import apply_rotary
from llava_npu.ops.swiglu import swiglu

Operation = Literal["rms_norm", "rotary", "swiglu"]

_ROTARY_FUNCTION = "apply_rotary_pos_emb"


def operations_worth_fusing(kind: str) -> tuple[Operation, ...]:
    """What `fuse` puts in on devices of this kind; fused operators hold other tensors for the backward pass."""
    return tuple(operation for operation in get_args(Operation) if kernels.has_kernel(operation, kind))


@dataclass(frozen=True)
class FusedModule:
    """A module whose forward was replaced: its name in the model, and by what."""

    name: str
    operation: Operation


@dataclass(frozen=True)
class LeftModule:
    """A module that looks as if it could be fused, and why it was not."""

    name: str
    operation: Operation
    reason: str


class FusedModules:
    """What `fuse` did to a model.

    Attributes:
        fused: the modules that it replaced the forward of.
        left: the modules that it left, though they looked as if they could be fused.
    """

    def __init__(self) -> None:
        self.fused: list[FusedModule] = []
        self.left: list[LeftModule] = []
        self._modules: list[nn.Module] = []

    def count(self, operation: Operation) -> int:
        return sum(module.operation == operation for module in self.fused)

    def undo(self) -> None:
        """Gives every fused module its class's forward back."""
        for module in self._modules:
            del module.__dict__["forward"]
        self._modules.clear()
        self.fused.clear()

    def _replace(self, name: str, module: nn.Module, operation: Operation, forward: Callable[..., Any]) -> None:
        module.__dict__["forward"] = types.MethodType(forward, module)
        self._modules.append(module)
        self.fused.append(FusedModule(name, operation))


def fuse(model: nn.Module, device: torch.device, operations: Collection[Operation] | None = None) -> FusedModules:
    """Replaces RMSNorm, rotary embedding and SwiGLU in a built model by fused operations.

    Call it once the model is built, before it is wrapped (FSDP, DeepSpeed) or compiled.

    Args:
        model: any model; what is not recognised stays as it is.
        device: where the model will run; decides which operations are worth fusing.
        operations: these instead, whatever the device (on devices without a fused operator they compute the plain
            formula).

    Returns:
        What was replaced and what was left, with `undo()`.
    """
    chosen = operations_worth_fusing(device.type) if operations is None else operations
    result = FusedModules()
    scaled_rotary = _scaled_rotary_embedding(model)
    for name, module in model.named_modules():
        operation = _recognise(module)
        if operation is None or operation not in chosen:
            continue
        reason = _reason_to_leave(module, operation, scaled_rotary)
        if reason is None:
            result._replace(name, module, operation, _fused_forward(type(module).forward, operation))
        else:
            result.left.append(LeftModule(name, operation, reason))
    return result


def _recognise(module: nn.Module) -> Operation | None:
    """Which operation a module looks like, by its attributes."""
    if type(module).__name__.endswith("RMSNorm"):
        return "rms_norm"
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return "swiglu"
    code = getattr(type(module).forward, "__code__", None)
    return "rotary" if code is not None and _ROTARY_FUNCTION in code.co_names else None


def _reason_to_leave(module: nn.Module, operation: Operation, scaled_rotary: str | None) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is already replaced, by a hook or another tool"
    if not _computes_the_same(type(module).forward, operation):
        return f"{type(module).__name__} computes something else"
    if operation == "swiglu" and not _is_silu(activation := cast(Any, module).act_fn):
        return f"its activation is {activation}, not SiLU"
    if operation == "rotary" and scaled_rotary is not None:
        return f"{scaled_rotary} scales cosines and sines beyond 1, outside what the fused operator documents"
    return None


def _fused_forward(forward: Callable[..., Any], operation: Operation) -> Callable[..., Any]:
    if operation == "rms_norm":
        return _rms_norm_forward
    return _swiglu_forward if operation == "swiglu" else _with_fused_rotary(forward)


def _rms_norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _swiglu_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))
    return out


@functools.cache
def _with_fused_rotary(forward: Any) -> Callable[..., Any]:
    """A copy of an attention's forward in which the rotary function's name means the fused one."""
    names = {**forward.__globals__, _ROTARY_FUNCTION: apply_rotary}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copy, forward)


def _scaled_rotary_embedding(model: nn.Module) -> str | None:
    """The name of a rotary embedding (YaRN, LongRoPE) that multiplies its cosines and sines, if there is one."""
    for name, module in model.named_modules():
        if getattr(module, "attention_scaling", 1.0) != 1.0:
            return name
    return None


# Each of these runs a class's own forward on a stand-in that has nothing but the attributes of the plain case, with
# weights that tell look-alikes apart. A forward that asks for anything else is not the plain case.


@functools.cache
def _computes_the_same(forward: Callable[..., Any], operation: Operation) -> bool:
    if operation == "rms_norm":
        return _is_plain_rms_norm(forward)
    return _is_plain_swiglu(forward) if operation == "swiglu" else _calls_plain_rotary(forward)


def _is_plain_rms_norm(forward: Callable[..., Any]) -> bool:
    hidden, weight = _random(3, 8), _random(8)
    stand_in = types.SimpleNamespace(weight=weight, variance_epsilon=0.1)
    return _try(forward, stand_in, hidden, expected=rms_norm(hidden, weight, 0.1))


def _is_plain_swiglu(forward: Callable[..., Any]) -> bool:
    hidden, gate, up, down = _random(3, 8), _random(8, 6), _random(8, 6), _random(6, 8)
    stand_in = types.SimpleNamespace(
        gate_proj=lambda x: x @ gate,
        up_proj=lambda x: x @ up,
        down_proj=lambda x: x @ down,
        act_fn=nn.functional.silu,
    )
    return _try(forward, stand_in, hidden, expected=swiglu(hidden @ gate, hidden @ up) @ down)


def _calls_plain_rotary(forward: Any) -> bool:
    rotary = forward.__globals__[_ROTARY_FUNCTION]
    query, key, cos, sin = _random(2, 3, 5, 8), _random(2, 1, 5, 8), _random(2, 5, 8), _random(2, 5, 8)
    if not _try(rotary, query, key, cos, sin, expected=torch.cat(apply_rotary(query, key, cos, sin), dim=1)):
        return False
    try:
        rotary(query, key, cos[..., :4], sin[..., :4])
    except RuntimeError:
        return True
    return False  # it rotates a part of the head when the angles are fewer: not the plain case


def _is_silu(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    numbers = _random(16)
    return _try(activation, numbers, expected=nn.functional.silu(numbers))


def _try(function: Callable[..., Any], *args: Any, expected: torch.Tensor) -> bool:
    with torch.no_grad():
        try:
            out = function(*args)
        except (AttributeError, TypeError):
            return False
    if isinstance(out, tuple):
        out = torch.cat(out, dim=1)
    return isinstance(out, torch.Tensor) and out.shape == expected.shape and torch.allclose(out, expected, atol=1e-6)


def _random(*shape: int) -> torch.Tensor:
    # Of its own generator: fusing a model must not move anyone's random numbers.
    with torch.device("cpu"):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
