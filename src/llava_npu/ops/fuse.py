"""Puts fused operations into a built model, module by module, and takes them out again.

Only instances are touched: each fused module gets a `forward` of its own, while classes, library modules, parameters
and state-dict keys stay as they were. Nothing is chosen by a list of class names. A module is fused if its class's own
forward, tried on small random numbers, computes what the fused operation computes; so Llama, Mistral, Qwen and
similar models are all fused, and a look-alike (a gate of GELU) is left alone, with the reason. An operation has a few
published forms (`_FORMS`): Gemma's norm multiplies by one plus the weight, Phi-3 joins gate and value in one layer, GLM
rotates neighbouring channels and only a part of a head.

Rotary embedding is not a module but a function that attention calls by name. An attention's class forward is therefore
copied with that one name bound to the fused function. Angles come from the model as before, so that its base
(`rope_theta`) and its scaling are kept.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_npu.ops import kernels
from llava_npu.ops.attention.transformers_interface import use_packed_attention
from llava_npu.ops.rms_norm import offset_rms_norm, rms_norm
from llava_npu.ops.rotary import apply_neighbour_rotary, apply_repeated_neighbour_rotary, apply_rotary
from llava_npu.ops.swiglu import swiglu, swiglu_of_halves

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


@dataclass(frozen=True)
class _Form:
    """One form of an operation.

    Attributes:
        computes: whether a class's forward computes just this.
        fused: the forward that takes its place, made of it.
    """

    computes: Callable[[Any], bool]
    fused: Callable[[Any], Callable[..., Any]]


def _recognise(module: nn.Module) -> Operation | None:
    """Which operation a module looks like, by its attributes."""
    if type(module).__name__.endswith("RMSNorm"):
        return "rms_norm"
    if hasattr(module, "down_proj") and _activation(module) is not None:
        separate = hasattr(module, "gate_proj") and hasattr(module, "up_proj")
        return "swiglu" if separate or hasattr(module, "gate_up_proj") else None
    code = getattr(type(module).forward, "__code__", None)
    return "rotary" if code is not None and _ROTARY_FUNCTION in code.co_names else None


def _activation(module: nn.Module) -> Any:
    """By either name that gated layers give it; None where there is none."""
    return getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)


def _reason_to_leave(module: nn.Module, operation: Operation, scaled_rotary: str | None) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is already replaced, by a hook or another tool"
    if _form_of(type(module).forward, operation) is None:
        return f"{type(module).__name__} computes something else"
    if operation == "swiglu" and not _is_silu(activation := _activation(module)):
        return f"its activation is {activation}, not SiLU"
    if operation == "rotary" and scaled_rotary is not None:
        return f"{scaled_rotary} scales cosines and sines beyond 1, outside what the fused operator documents"
    return None


def _fused_forward(forward: Callable[..., Any], operation: Operation) -> Callable[..., Any]:
    form = _form_of(forward, operation)
    assert form is not None
    return form.fused(forward)


def _rms_norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _offset_rms_norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return offset_rms_norm(x, self.weight, self.eps)


def _swiglu_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))
    return out


def _joined_swiglu_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(swiglu_of_halves(self.gate_up_proj(hidden_states)))
    return out


@functools.cache
def _with_rotary(rotary: Callable[..., Any], forward: Any) -> Callable[..., Any]:
    """A copy of an attention's forward in which the rotary function's name means `rotary`."""
    names = {**forward.__globals__, _ROTARY_FUNCTION: rotary}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copy, forward)


def _scaled_rotary_embedding(model: nn.Module) -> str | None:
    """The name of a rotary embedding (YaRN, LongRoPE) that multiplies its cosines and sines, if there is one."""
    for name, module in model.named_modules():
        if getattr(module, "attention_scaling", 1.0) != 1.0:
            return name
    return None


# Each of these runs a class's own forward on a stand-in that has nothing but the attributes of one form, with weights
# that tell look-alikes apart. A forward that asks for anything else is not of that form.


@functools.cache
def _form_of(forward: Any, operation: Operation) -> _Form | None:
    return next((form for form in _FORMS[operation] if form.computes(forward)), None)


def _is_plain_rms_norm(forward: Callable[..., Any]) -> bool:
    hidden, weight = _random(3, 8), _random(8)
    stand_in = types.SimpleNamespace(weight=weight, variance_epsilon=0.1)
    return _try(forward, stand_in, hidden, expected=rms_norm(hidden, weight, 0.1))


def _is_offset_rms_norm(forward: Callable[..., Any]) -> bool:
    hidden, weight = _random(3, 8), _random(8)

    def normalise(x: torch.Tensor) -> torch.Tensor:
        return offset_rms_norm(x, torch.zeros(8), 0.1)

    stand_in = types.SimpleNamespace(weight=weight, eps=0.1, _norm=normalise)
    return _try(forward, stand_in, hidden, expected=offset_rms_norm(hidden, weight, 0.1))


def _is_plain_swiglu(forward: Callable[..., Any]) -> bool:
    hidden, gate, up, down = _random(3, 8), _random(8, 6), _random(8, 6), _random(6, 8)
    stand_in = types.SimpleNamespace(
        gate_proj=lambda x: x @ gate,
        up_proj=lambda x: x @ up,
        down_proj=lambda x: x @ down,
        act_fn=nn.functional.silu,
    )
    return _try(forward, stand_in, hidden, expected=swiglu(hidden @ gate, hidden @ up) @ down)


def _is_joined_swiglu(forward: Callable[..., Any]) -> bool:
    hidden, gate_up, down = _random(3, 8), _random(8, 12), _random(6, 8)
    stand_in = types.SimpleNamespace(
        gate_up_proj=lambda x: x @ gate_up, down_proj=lambda x: x @ down, activation_fn=nn.functional.silu
    )
    return _try(forward, stand_in, hidden, expected=swiglu_of_halves(hidden @ gate_up) @ down)


def _calls(rotary: Callable[..., Any], forward: Any) -> bool:
    """Whether the function that an attention calls rotates as `rotary` does: whole heads, and parts of them or none."""
    theirs = forward.__globals__[_ROTARY_FUNCTION]
    query, key, cos, sin = _random(2, 3, 5, 8), _random(2, 1, 5, 8), _random(2, 5, 8), _random(2, 5, 8)
    if not _try(theirs, query, key, cos, sin, expected=torch.cat(rotary(query, key, cos, sin), dim=1)):
        return False
    cos, sin = cos[..., :4], sin[..., :4]
    try:
        theirs(query, key, cos, sin)
    except RuntimeError:
        return True  # whole heads only; who calls it for parts cuts them out
    return _try(theirs, query, key, cos, sin, expected=torch.cat(rotary(query, key, cos, sin), dim=1))


def _rotary_form(rotary: Callable[..., Any]) -> _Form:
    return _Form(functools.partial(_calls, rotary), functools.partial(_with_rotary, rotary))


_FORMS: dict[Operation, tuple[_Form, ...]] = {
    "rms_norm": (
        _Form(_is_plain_rms_norm, lambda _: _rms_norm_forward),
        _Form(_is_offset_rms_norm, lambda _: _offset_rms_norm_forward),
    ),
    "rotary": tuple(map(_rotary_form, (apply_rotary, apply_neighbour_rotary, apply_repeated_neighbour_rotary))),
    "swiglu": (
        _Form(_is_plain_swiglu, lambda _: _swiglu_forward),
        _Form(_is_joined_swiglu, lambda _: _joined_swiglu_forward),
    ),
}


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


def install_kernels(model: PreTrainedModel, device: torch.device) -> FusedModules:
    """Switches attention, in the language model and the vision tower, and fuses what `device` has operators for.

    Call it once the model is on its device, before it is wrapped or compiled. The numbers stay those of the model, up
    to rounding; weights and state-dict keys are untouched.
    """
    use_packed_attention(model)
    return fuse(model, device)
