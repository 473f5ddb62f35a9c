"""AdamW with parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llava_npu import devices
from llava_npu.config import OptimizerConfig
from llava_npu.config.parts import Part, PartName
from llava_npu.errors import UserError
from llava_npu.training.parts import part_of, trained_parameters


def build_optimizer(model: nn.Module, config: OptimizerConfig, parts: Mapping[PartName, Part]) -> torch.optim.AdamW:
    """AdamW over what is trained, in up to two groups for each part: decayed and not decayed.

    Norm weights and biases (every parameter of one dimension) are not decayed. Each group carries `peak`, the learning
    rate at the top of its schedule.

    Raises:
        UserError: nothing is trained.
    """
    groups: dict[tuple[PartName, bool], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model):
        groups.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise UserError("nothing would be trained: none of the parts that this run trains has weights (see `parts`).")
    described = [
        {
            "params": parameters,
            "peak": parts[part].learning_rate,
            "weight_decay": parts[part].weight_decay if decayed else 0.0,
            "name": part + ("" if decayed else ", not decayed"),
        }
        for (part, decayed), parameters in sorted(groups.items())
    ]
    return fused_adamw(described, config.learning_rate, config.betas, config.epsilon)


def fused_adamw(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW in one kernel: quicker, and on most devices able to skip a step without the host."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def clip_and_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.Tensor:
    """Scales the gradient down to a norm of `max_grad_norm` (0: leaves it alone) and moves the weights by it.

    Where the gradient is not finite, nothing moves. Where the fused optimizer heeds `found_inf`, the device decides
    that and the host does not wait to know.

    Returns:
        The norm of the whole gradient, before scaling.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if devices.of_kind(norm.device.type).optimizer_heeds_found_inf:
        # Fused AdamW reads this, as torch's GradScaler has it: weights, moments and the count of steps stay.
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(norm.isfinite()):  # the host waits: nothing on the device would stop the step
        optimizer.step()
    return norm


def schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """The factor on the peak learning rate at `step` (from 0): linear warmup from 0, then cosine to 0.

    As `get_cosine_schedule_with_warmup` of transformers, which official LLaVA uses: warmup takes ⌈ratio · steps⌉ steps,
    and the first of them has rate 0.
    """
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
