"""Parameter groups and the schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from llava_npu.config import OptimizerConfig
from llava_npu.config.parts import Part
from llava_npu.training.optimizer import build_optimizer, schedule, set_learning_rate


def _model() -> nn.Module:
    model = nn.Module()
    model.model = nn.Module()
    model.model.multi_modal_projector = nn.Linear(4, 4)
    model.model.language_model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.model.vision_tower = nn.Linear(4, 4).requires_grad_(False)
    return model


def test_norms_and_biases_are_not_decayed_and_each_part_has_its_own_rate_and_decay() -> None:
    model = _model()
    parts = {
        "vision_tower": Part("frozen", 1.0, 1.0),
        "projector": Part("full", 1e-3, 0.1),
        "language_model": Part("full", 1e-4, 0.2),
    }
    optimizer = build_optimizer(model, OptimizerConfig(), parts)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(groups) == 6
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            assert id(parameter) not in groups
            continue
        group, part = groups[id(parameter)], parts["projector" if "projector" in name else "language_model"]
        assert group["weight_decay"] == (part.weight_decay if parameter.ndim == 2 else 0.0), name
        assert group["peak"] == part.learning_rate, name
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 5e-5}


@given(steps=st.integers(1, 400), ratio=st.floats(0, 0.9))
def test_schedule_equals_transformers(steps: int, ratio: float) -> None:
    import math

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, math.ceil(ratio * steps), steps)
    for step in range(steps):
        assert schedule(step, steps, ratio) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
