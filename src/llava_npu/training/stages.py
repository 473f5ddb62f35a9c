"""What each stage trains: `align` the projector on captions, `finetune` the projector and the language model.

The vision tower is frozen in both, as in LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from llava_npu.models.modeling import LlavaNpuForConditionalGeneration

PROJECTOR = "model.multi_modal_projector."
VISION_TOWER = "model.vision_tower."


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes:
        trains_language_model: whether the language model learns beside the projector.
        default_template: the conversation template where the configuration names none; None: the model's own.
    """

    trains_language_model: bool
    default_template: str | None


STAGES = {
    "align": Stage(trains_language_model=False, default_template="plain"),
    "finetune": Stage(trains_language_model=True, default_template=None),
}


def freeze(
    model: LlavaNpuForConditionalGeneration, stage: Stage, compute_dtype: torch.dtype | None, checkpointing: bool
) -> None:
    """Sets what is trained, in which type each part is kept, and each part's mode.

    Trained weights are float32 (small updates vanish in 16 bits). Frozen ones are kept in `compute_dtype`, if given:
    half the memory, and the same products as under autocast. Batch normalisation stays float32 as a whole: its
    statistics are buffers, and weights in another type than they are refused.
    """
    model.train()
    unrounded = {id(parameter) for parameter in _batch_norm_parameters(model)}
    for name, parameter in model.named_parameters():
        trained = name.startswith(PROJECTOR) or (stage.trains_language_model and not name.startswith(VISION_TOWER))
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
        elif compute_dtype is not None and id(parameter) not in unrounded:
            parameter.data = parameter.data.to(compute_dtype)
    # Not only no gradient: batch normalisation and dropout of a frozen part must not move either.
    model.model.vision_tower.eval()
    if not stage.trains_language_model:
        model.model.language_model.eval()
    if checkpointing:
        # Transformers recomputes only in modules that are in training mode; without dropout the mode changes no number.
        model.model.language_model.train()
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})


def _batch_norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from module.parameters()


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that learns, in a fixed order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
