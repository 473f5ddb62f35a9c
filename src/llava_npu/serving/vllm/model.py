"""vLLM's LLaVA with one of this project's projectors.

Source: vLLM's `model_executor/models/llava.py`, whose classes this extends by what differs: the projector, and how many
tokens it gives for an image.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava_npu.errors import UserError
from llava_npu.models.configuration import VLLM_TOWERS, LlavaNpuConfig
from llava_npu.models.processing import LlavaNpuProcessor
from llava_npu.models.vision.two_towers import TwoTowersConfig


class LlavaNpuProcessingInfo(LlavaProcessingInfo):
    """How many tokens an image takes: the projector's answer, whatever its size, since all are brought to one."""

    def get_hf_config(self) -> LlavaNpuConfig:
        _check(self.ctx.get_hf_config(PretrainedConfig))  # here, before vLLM starts the process that loads the model
        return self.ctx.get_hf_config(LlavaNpuConfig)

    def get_hf_processor(self, **kwargs: object) -> LlavaNpuProcessor:
        return self.ctx.get_hf_processor(LlavaNpuProcessor, **kwargs)

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.get_hf_config().num_image_tokens


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaNpuProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VllmLlavaNpu(LlavaForConditionalGeneration):
    """vLLM's LLaVA; everything but the projector is its own."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        _check(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.multi_modal_projector = _projector(config)


def _check(config: Any) -> None:
    """Raises `UserError` for what vLLM's LLaVA cannot do, and would not notice.

    `config` is a `LlavaNpuConfig`, or transformers' for a plain LLaVA with a tower that vLLM does not have.
    """
    tower = config.vision_config.model_type
    what = None
    if tower == TwoTowersConfig.model_type:
        what = "it has two vision towers"
    elif tower not in VLLM_TOWERS:
        what = f"it has a vision tower of type {tower!r}"
    elif len(config.feature_layers) > 1:
        what = f"projector {config.projector_type!r} takes {len(config.feature_layers)} layers"
    elif list(config.scales) != [1]:
        what = f"images are seen at the scales {config.scales}"
    elif config.tiling is not None:
        what = "images are seen as several tiles (anyres)"
    if what is not None:
        raise UserError(
            f"vLLM cannot run this model: {what}; vLLM's LLaVA knows CLIP and SigLIP, and one layer, one size and "
            "one tile of an image. Use `llava-npu serve`."
        )


def _projector(config: LlavaNpuConfig) -> nn.Module:
    """The model's projector, which is told the tower's grid at every call: vLLM does not pass it on."""
    projector = config.new_projector()
    grid = config.tower.grid
    projector.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "grid": grid}), with_kwargs=True)
    return projector
