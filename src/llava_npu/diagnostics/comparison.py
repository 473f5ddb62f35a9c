"""How far two tensors are apart, and how far they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Stage = Literal["forward", "gradient", "steps"]
Kind = Literal["operation", "model"]

# Largest relative errors that pass. One rounding is 6e-8 in float32, 4e-3 in bfloat16 and 5e-4 in float16. An operation
# rounds products and sums a few dozen times; a model repeats that in each layer, forth and back; Adam lifts the errors
# of small gradients. A CPU stays at least twice below these limits. A wrong mask, a missing term, or float32 products
# rounded to TF32 (1e-3) are far above.
LIMITS: dict[tuple[Kind, torch.dtype], dict[Stage, float]] = {
    ("operation", torch.float32): {"forward": 1e-5, "gradient": 1e-5, "steps": 1e-4},
    ("operation", torch.bfloat16): {"forward": 2e-2, "gradient": 3e-2},
    ("operation", torch.float16): {"forward": 3e-3, "gradient": 5e-3},
    ("model", torch.float32): {"forward": 5e-5, "gradient": 5e-5, "steps": 2e-4},
    ("model", torch.bfloat16): {"forward": 5e-2, "gradient": 1e-1, "steps": 6e-1},
    ("model", torch.float16): {"forward": 1e-2, "gradient": 3e-2, "steps": 1.5e-1},
}


_WORST_OF_MANY = 2.0  # the worst row of thousands is by rounding alone as much further off than they are together


@dataclass(frozen=True)
class Comparison:
    """One number of the device compared with the CPU's.

    Attributes:
        kind: "operation" or "model".
        subject: the operation's or the model's name.
        part: the case of an operation, the layer of a model, or "".
        stage: outputs, gradients, or what training steps change.
        quantity: which tensor, as in "gradient of key".
        dtype: what the device computed in, as in "float32".
        error: relative error; infinite if there is nothing to compare.
        limit: the largest error that passes.
        problem: what the device raised instead of an answer, or "".
    """

    kind: Kind
    subject: str
    part: str
    stage: Stage
    quantity: str
    dtype: str
    error: float
    limit: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN is not


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error: in the Euclidean norm, in the maximum norm, and half of one row's; in float64.

    The first sees a small error everywhere, the second a large one among many. A row lies along the last axis; its
    error is related to its own norm or, where that is smaller, to the root mean square of the rows' norms. Where rows
    differ in size, as attention's means over few and over many values do, norms of the whole see the large rows alone.
    Infinite for shapes that differ and for results that are not finite.
    """
    if actual.shape != expected.shape:
        return math.inf
    wide, reference = actual.detach().cpu().double(), expected.detach().cpu().double()
    if not bool(wide.isfinite().all()):
        return math.inf
    difference = wide - reference
    errors = [
        _ratio(difference.norm(), reference.norm()),
        _ratio(difference.abs().max(), reference.abs().max()),
    ]
    if reference.ndim > 1:
        sizes = reference.norm(dim=-1)
        typical = sizes.square().mean().sqrt()
        if typical > 0:
            worst = float((difference.norm(dim=-1) / sizes.clamp(min=float(typical))).max())
            errors.append(worst / _WORST_OF_MANY)
    return max(errors)


def _ratio(difference: torch.Tensor, size: torch.Tensor) -> float:
    return float(difference / size) if size > 0 else float(difference)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
