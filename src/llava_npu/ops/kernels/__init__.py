"""Which implementation an operation has on which kind of device.

An operation of `ops/` has one signature and a formula in plain torch. A kind of device that can do better has a folder
of its own here, `kernels/KIND/`, whose files register what they implement:

    @register("rms_norm", "npu")
    def rms_norm(hidden, weight, epsilon): ...

Nothing else names a kind of device: the folder is imported when a tensor of that kind first reaches an operation. An
implementation takes every input that the operation takes; what its operators cannot do, it computes by the formula.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import TypeVar

import torch

from llava_npu.ops.fake_ops import kind_of

T = TypeVar("T")

_registered: dict[tuple[str, str], object] = {}


def register(operation: str, kind: str) -> Callable[[T], T]:
    """Makes what it decorates the implementation of `operation` on devices of `kind`."""

    def keep(implementation: T) -> T:
        _registered[operation, kind] = implementation
        return implementation

    return keep


def find(operation: str, tensor: torch.Tensor, formula: T) -> T:
    """The implementation for the device that holds `tensor`; `formula` where its kind has none."""
    kind = kind_of(tensor)
    _load(kind)
    return _registered.get((operation, kind), formula)  # type: ignore[return-value]


def has_kernel(operation: str, kind: str) -> bool:
    """Whether devices of `kind` have an implementation of their own."""
    _load(kind)
    return (operation, kind) in _registered


@functools.cache
def _load(kind: str) -> None:
    name = f"{__name__}.{kind}"
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
