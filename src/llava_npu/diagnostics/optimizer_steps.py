"""Training's optimizer on the device compared with its formula; also across a step that must be skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from llava_npu.diagnostics.comparison import LIMITS, Comparison, relative_error, short
from llava_npu.diagnostics.operations import random_tensor
from llava_npu.training.optimizer import clip_and_step, fused_adamw

_RATE, _BETAS, _EPSILON, _DECAY, _MAX_NORM = 1e-2, (0.9, 0.999), 1e-8, 0.1, 1.0
_SHAPES = ((512, 300), (300,))
_GOOD, _NOT_FINITE = range(2)
_CASES = {"five steps": (_GOOD,) * 5, "one step skipped": (_GOOD, _GOOD, _NOT_FINITE, _GOOD)}


def compare_optimizer(device: torch.device) -> Iterator[Comparison]:
    """What steps change, in float32; a step with a gradient that is not finite changes nothing."""
    limit = LIMITS["operation", torch.float32]["steps"]
    for case, steps in _CASES.items():
        expected = _changes_by_formula(sum(step == _GOOD for step in steps))
        error, problem = math.inf, ""
        try:
            error = max(map(relative_error, _changes(steps, device), expected))
        except Exception as raised:  # noqa: BLE001  a device fails in whatever way it likes; that is the finding
            problem = f"{type(raised).__name__}: {raised}"
        yield Comparison(
            "operation", "fused AdamW", case, "steps", "change of the weights", short(torch.float32), error, limit,
            problem,
        )  # fmt: skip


def _weights() -> list[torch.Tensor]:
    return [random_tensor(*shape).float() for shape in _SHAPES]


def _gradients(step: int) -> list[torch.Tensor]:
    return [random_tensor(*shape, seed=step + 1).float() for shape in _SHAPES]


def _changes(steps: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    before = _weights()
    parameters = [nn.Parameter(weight.clone().to(device)) for weight in before]
    optimizer = fused_adamw([{"params": parameters, "weight_decay": _DECAY}], _RATE, _BETAS, _EPSILON)
    good = 0
    for step in steps:
        for parameter, gradient in zip(parameters, _gradients(good), strict=True):
            parameter.grad = gradient.to(device)
        if step == _NOT_FINITE:
            assert parameters[0].grad is not None
            parameters[0].grad[0, 0] = math.nan
        clip_and_step(optimizer, _MAX_NORM)
        good += step == _GOOD
    return [after.detach().cpu() - weight for after, weight in zip(parameters, before, strict=True)]


def _changes_by_formula(steps: int) -> list[torch.Tensor]:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) in float64, gradients clipped to a norm of `_MAX_NORM`."""
    before = [weight.double() for weight in _weights()]
    weights = list(before)
    first, second = ([torch.zeros_like(weight) for weight in before] for _ in range(2))
    for step in range(steps):
        gradients = [gradient.double() for gradient in _gradients(step)]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for number, gradient in enumerate(gradients):
            gradient = gradient * min(1.0, _MAX_NORM / float(norm))
            first[number] = _BETAS[0] * first[number] + (1 - _BETAS[0]) * gradient
            second[number] = _BETAS[1] * second[number] + (1 - _BETAS[1]) * gradient**2
            mean = first[number] / (1 - _BETAS[0] ** (step + 1))
            size = (second[number] / (1 - _BETAS[1] ** (step + 1))).sqrt()
            weights[number] = weights[number] * (1 - _RATE * _DECAY) - _RATE * mean / (size + _EPSILON)
    return [after - weight for after, weight in zip(weights, before, strict=True)]
