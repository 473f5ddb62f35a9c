"""The model that a run starts from, and the one that it leaves, in Hugging Face or peft layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llava_npu.config import RunConfig
from llava_npu.hub.hubs import on_hub
from llava_npu.models.adapters import save_adapters
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.loading import open_source
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import LlavaNpuProcessor
from llava_npu.models.sources import ModelSource
from llava_npu.training.parts import adapter_settings


def model_source(config: RunConfig) -> ModelSource:
    """Where the weights come from that a run starts with."""
    choice = config.model
    if choice.checkpoint is not None:
        images = {
            "image_aspect_ratio": choice.image_aspect_ratio,
            "image_grid_pinpoints": choice.image_grid_pinpoints,
            "seed": config.seed,
        }
        return ModelSource(
            checkpoint=on_hub(choice.checkpoint, choice.source),
            changes={} if choice.image_aspect_ratio is None else images,
            said=choice.explicit_keys,
        )
    assert choice.vision_tower is not None
    assert choice.language_model is not None
    return ModelSource(
        parts={
            "vision_tower": on_hub(choice.vision_tower, choice.source),
            "language_model": on_hub(choice.language_model, choice.source),
            "projector_type": choice.projector,
            "projector_options": choice.projector_options,
            "vision_feature_layer": choice.vision_feature_layer,
            "keep_prefix_tokens": choice.vision_select_feature == "cls_patch",
            "image_aspect_ratio": choice.image_aspect_ratio or "pad",
            "image_grid_pinpoints": choice.image_grid_pinpoints,
            "image_size": choice.image_size,
            "scales": choice.scales,
            "seed": config.seed,
        }
    )


def build_model(config: RunConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model that a run starts from, on the CPU."""
    return open_source(model_source(config), dtype)


def export_adapters(
    target: Path, config: RunConfig, trained: Mapping[str, torch.Tensor], processor: LlavaNpuProcessor
) -> None:
    """Writes what a run with adapters trained, projector included, with the name of the model that it started from."""
    save_adapters(target, trained, adapter_settings(config.lora), model_source(config))
    processor.save_pretrained(target)


def with_pristine_frozen_parts(
    config: RunConfig, trained: Mapping[str, torch.Tensor]
) -> LlavaNpuForConditionalGeneration:
    """What was trained, with the frozen parts as they came: in training those may be rounded to 16 bits."""
    pristine = build_model(config).model
    weights = pristine.state_dict()
    with torch.no_grad():
        for name, tensor in trained.items():
            weights[name].copy_(tensor)
    return pristine
