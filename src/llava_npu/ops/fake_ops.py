"""Fake operators: run a model for its memory alone, as another kind of device would, on tensors without numbers.

    with FakeTensorMode(), planned_for("npu"):
        model(...)          # takes the paths that it takes on an Ascend, on a machine that has none

Where an operation asks which device it is for, `kind_of` answers with the planned one; where it calls an operator of
torch_npu, `npu_operators` gives a fake one: outputs of the operator's shapes and types, and between forward and
backward the same tensors held. What an operator holds is what its documentation says that its gradient takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class PlannedKind:
    """One `planned_for`; what is made within it must not be found, in a cache, outside."""

    def __init__(self, kind: str):
        self.kind = kind


_planned: ContextVar[PlannedKind | None] = ContextVar("planned", default=None)

# The softmax's maximum and sum of each query and head, each repeated to a block of 32 bytes.
_STATISTICS = 8


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Operations take the paths of this kind of device; for tensors that have no numbers.

    A GPU is planned on the CPU's paths: what its fused attention holds is what the CPU's holds.
    """
    before = _planned.set(PlannedKind(kind) if kind == "npu" else None)
    try:
        yield
    finally:
        _planned.reset(before)


def planned_kind() -> PlannedKind | None:
    """The current `planned_for`; None where numbers are computed."""
    return _planned.get()


def kind_of(tensor: torch.Tensor) -> str:
    """The kind of device whose operations `tensor` should go through."""
    planned = _planned.get()
    return tensor.device.type if planned is None else planned.kind


def npu_operators() -> Any:
    """The module with torch_npu's operators: torch_npu itself, or their fakes while planning."""
    return importlib.import_module("torch_npu") if _planned.get() is None else _FakeOperators


class _FakeOperators:
    """The operators that this project calls, by their names and arguments in torch_npu."""

    @staticmethod
    def npu_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
        def outputs() -> tuple[torch.Tensor, ...]:
            return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)

        return _Held.apply(outputs, (1,), x, weight)

    @staticmethod
    def npu_swiglu(both: torch.Tensor, dim: int) -> torch.Tensor:
        return _Held.apply(lambda: (both.new_empty(*both.shape[:-1], both.shape[-1] // 2),), (), both)[0]

    @staticmethod
    def npu_rotary_mul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return _Held.apply(lambda: (torch.empty_like(x),), (), x, cos, sin)[0]

    @staticmethod
    def npu_fusion_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: int,
        layout: str,
        atten_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        def outputs() -> tuple[torch.Tensor, ...]:
            statistics = (*query.shape[:-1], _STATISTICS)
            return (
                query.new_empty(*query.shape[:-1], value.shape[-1]),
                query.new_empty(statistics, dtype=torch.float32),
                query.new_empty(statistics, dtype=torch.float32),
            )

        mask = () if atten_mask is None else (atten_mask,)
        return _Held.apply(outputs, (0, 1, 2), query, key, value, *mask)

    @staticmethod
    def npu_fused_infer_attention_score(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(1, dtype=torch.float32)


class _Held(torch.autograd.Function):
    """Holds all inputs, and of its outputs those at the given positions."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Callable[[], tuple[torch.Tensor, ...]], held: tuple[int, ...], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        made = outputs()
        ctx.save_for_backward(*inputs, *(made[position] for position in held))
        ctx.mark_non_differentiable(*made[1:])
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The saved tensors start with the inputs; the outputs behind them need no gradient.
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=False)
        return (None, None, *(torch.empty_like(tensor) if need else None for tensor, need in needed))
