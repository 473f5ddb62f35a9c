"""Pretrained models whose weights stay in their files: mapped, so that all processes of a host share one copy.

transformers converts every weight to the type of the model while it loads it, which gives each process a private copy.
Here it keeps the type and the memory that the file gives it, and is converted where it is needed, at last: by the
engine that puts it on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from llava_npu.models.checkpoints.weight_files import find_weights


class _AsStored(torch.Tensor):
    """A weight that stays what it is when it is asked to change its type.

    transformers loads from slices of a file, and asks each for the type of the model. A release that asks in another
    way gets what it asks for: a private copy, with the same numbers.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and args[0].is_floating_point():
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def load_mapped(
    model_class: type[PreTrainedModel], folder: Path, config: PreTrainedConfig
) -> tuple[Any, dict[str, Any]]:
    """What `model_class.from_pretrained(folder, config=config, output_loading_info=True)` gives, weights as stored.

    Buffers that are computed, not stored, are those of a float32 model, and so is the type in its configuration.

    Returns:
        The model, whose weights may be of several types, and transformers' loading information.
    """
    files = find_weights(folder)
    assert files is not None  # the caller has checked the folder
    model, info = with_weights(model_class, config, dict(files))
    model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


def with_weights(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]
) -> tuple[Any, dict[str, Any]]:
    """As `load_mapped`, from weights by their names in a file of this model."""
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict={name: tensor.as_subclass(_AsStored) for name, tensor in weights.items()},
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    _unwrap(model)
    return model, info


def _unwrap(model: nn.Module) -> None:
    """Plain tensors in place of those that refuse to change; tied weights stay tied."""
    seen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and isinstance(parameter, _AsStored):
                plain = seen.setdefault(id(parameter), nn.Parameter(parameter.detach().as_subclass(torch.Tensor)))
                module._parameters[name] = plain
        for name, buffer in module._buffers.items():
            if isinstance(buffer, _AsStored):  # small, and may change in training: a copy, in the model's type
                plain_buffer = buffer.as_subclass(torch.Tensor)
                module._buffers[name] = (
                    plain_buffer.float() if plain_buffer.is_floating_point() else plain_buffer.clone()
                )
