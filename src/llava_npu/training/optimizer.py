"""AdamW with parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

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
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": parts[part].learning_rate,
                "weight_decay": parts[part].weight_decay if decayed else 0.0,
                "name": part + ("" if decayed else ", not decayed"),
            }
            for (part, decayed), parameters in sorted(groups.items())
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,  # quicker, and able to skip a step without the host
    )


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
