"""Two vision towers in one model, as one tower to everything around them.

Each sees every image as its own image processor prepares it. What they see travels as one tensor, the second tower's
three channels behind the first's; images of the smaller tower stand in the upper left corner, zeros around them. What
they give is concatenated on channels, patch by patch, as in Prismatic's DINOv2 + SigLIP (Karamcheti et al. 2024,
arXiv:2402.07865); interleaving (Tong et al. 2024, arXiv:2401.06209) begins from the same features
(`projectors/interleaved.py`), so that both share a cache of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from llava_npu.models.vision.towers import describe_tower


@strict
class TwoTowersConfig(PreTrainedConfig):
    """The configurations of both towers."""

    model_type = "llava_npu_two_towers"
    sub_configs = {"first": AutoConfig, "second": AutoConfig}  # noqa: RUF012  as transformers declares it

    first: dict[str, Any] | PreTrainedConfig | None = None
    second: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.first, self.second = _as_config(self.first), _as_config(self.second)
        super().__post_init__(**kwargs)


class TwoTowers(PreTrainedModel):
    """Both towers, each run on its own part of the pixels."""

    config: TwoTowersConfig
    config_class = TwoTowersConfig
    main_input_name = "pixel_values"
    # Each tower says for itself what it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: TwoTowersConfig):
        super().__init__(config)
        self.first = AutoModel.from_config(config.first)
        self.second = AutoModel.from_config(config.second)
        self.supports_gradient_checkpointing = all(each.supports_gradient_checkpointing for each in self.towers)
        self.post_init()

    @property
    def towers(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The first and the second."""
        return self.first, self.second

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = True, **kwargs: Any) -> BaseModelOutput:
        """Runs both.

        Args:
            pixel_values: (images, 6, height, width), from `stack_pixels`.

        Returns:
            in `hidden_states` those of the first and those of the second tower; `towers.select_features` joins them.
        """
        states = []
        for number, tower in enumerate(self.towers):
            height, width = describe_tower(tower.config).image_size
            pixels = pixel_values[:, 3 * number : 3 * number + 3, :height, :width]
            states.append(tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states)
        return BaseModelOutput(hidden_states=tuple(states))


def join_towers(first: PreTrainedModel, second: PreTrainedModel) -> TwoTowers:
    """Two towers that are there already as one."""
    with torch.device("meta"):
        both = TwoTowers(TwoTowersConfig(first=first.config, second=second.config))
    both.first, both.second = first, second
    return both


class TwoTowersImageProcessor(BaseImageProcessor):
    """The image processors of both towers.

    It prepares nothing by itself: whoever pads images does so for each tower with that tower's colour
    (`LlavaNpuProcessor.preprocess_images`), and puts the results together by `stack_pixels`.
    """

    def __init__(self, first: Any = None, second: Any = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.first, self.second = _as_image_processor(first), _as_image_processor(second)

    def to_dict(self) -> dict[str, Any]:
        return {
            "image_processor_type": type(self).__name__,
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
        }


def image_processors(image_processor: Any) -> tuple[Any, ...]:
    """Of each tower its image processor."""
    if isinstance(image_processor, TwoTowersImageProcessor):
        return image_processor.first, image_processor.second
    return (image_processor,)


def stack_pixels(pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """(images, 3, height, width) of each tower → (images, 3 · towers, largest height, largest width)."""
    if len(pixels) == 1:
        return pixels[0]
    height, width = (max(each.shape[axis] for each in pixels) for axis in (-2, -1))
    return torch.cat([F.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2])) for each in pixels], dim=1)


def _as_config(values: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig | None:
    if not isinstance(values, dict):
        return values
    return AutoConfig.for_model(**values)


def _as_image_processor(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    name = values["image_processor_type"]
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind.from_dict(values)


AutoConfig.register(TwoTowersConfig.model_type, TwoTowersConfig, exist_ok=True)
AutoModel.register(TwoTowersConfig, TwoTowers, exist_ok=True)
AutoImageProcessor.register(
    TwoTowersConfig,
    image_processor_classes=dict.fromkeys(("pil", "torchvision"), TwoTowersImageProcessor),
    exist_ok=True,
)
