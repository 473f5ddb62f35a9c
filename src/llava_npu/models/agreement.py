"""A checkpoint defines its tower, projector and settings: if a configuration also sets them, they must match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.projectors import canonical_type, make_options


def check_agreement(explicit: Mapping[str, Any], checkpoint: str, config: LlavaNpuConfig) -> None:
    """Raises `UserError` where a run's configuration says something else of a new model than its checkpoint holds.

    Args:
        explicit: keys of the `model` section, as `ModelConfig.explicit_keys` gives them.
        checkpoint: its place, for messages.
        config: the checkpoint's own.
    """
    own = {key: (_comparable(key, value, config), _own(key, value, config)) for key, value in explicit.items()}
    if "projector" in own and own["projector"][0] != own["projector"][1]:
        own.pop("projector_options", None)  # they are of another type, which is reported
    wrong = [
        f"model.{key} is {explicit[key]!r}, but the checkpoint has {held!r}"
        for key, (wanted, held) in own.items()
        if wanted != held
    ]
    if wrong:
        raise UserError(
            "\n".join(wrong)
            + f"\nmodel.checkpoint {checkpoint} brings its own tower, projector and settings, which are "
            "not changed. Take these keys out; or leave `checkpoint` out and make a new model of `vision_tower` and "
            "`language_model`."
        )


def _comparable(key: str, value: Any, config: LlavaNpuConfig) -> Any:
    """A value of the configuration in the form in which `_own` gives the checkpoint's."""
    if key == "projector":
        return canonical_type(value)
    if key == "vision_feature_layer":
        return _from_the_front(value, config)
    return value


def _own(key: str, value: Any, config: LlavaNpuConfig) -> Any:
    """What the checkpoint has where the configuration says `value`."""
    if key == "projector":
        return canonical_type(config.projector_type)
    if key == "projector_options":  # of those that are given
        options = make_options(config.projector_type, **config.projector_options)
        return {name: _plain(getattr(options, name, None)) for name in value}
    if key == "vision_feature_layer":
        return _from_the_front(config.vision_feature_layer, config)
    if key == "vision_select_feature":
        return "cls_patch" if config.keep_prefix_tokens and config.tower.num_prefix_tokens else "patch"
    if key == "image_size":
        height, width = config.tower.image_size
        return height if height == width else [height, width]
    if key == "scales":
        return list(config.scales)
    raise ValueError(f"{key} is not a key of a new model")


def _from_the_front(layer: int | list[int], config: LlavaNpuConfig) -> int | list[int]:
    """−2 of 24 layers is 23: hidden states counted from the embedding, which is 0."""
    if isinstance(layer, int):
        return layer if layer >= 0 else config.tower.num_layers + 1 + layer
    return [config.tower.num_layers + 1 + each if each < 0 else each for each in layer]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
