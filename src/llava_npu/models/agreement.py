"""A checkpoint defines its tower, projector and settings: if a configuration also sets them, they must match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.projectors import canonical_type, make_options
from llava_npu.models.vision.towers import Tower


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
    if key == "image_size":
        return _one_for_all(value) if isinstance(value, list) else value
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
        sizes = [tower.image_size for tower in _towers(config)]
        return _one_for_all([height if height == width else [height, width] for height, width in sizes])
    if key == "tower_fusion":
        return config.tower_fusion
    if key == "scales":
        return list(config.scales)
    raise ValueError(f"{key} is not a key of a new model")


def _from_the_front(layer: int | list[int], config: LlavaNpuConfig) -> Any:
    """−2 of 24 layers is 23: hidden states counted from the embedding, which is 0."""

    def counted(each: int, tower: Tower) -> int:
        return each if each >= 0 else tower.num_layers + 1 + each

    if isinstance(layer, int):
        return _one_for_all([counted(layer, tower) for tower in _towers(config)])
    return _one_for_all([[counted(each, tower) for each in layer] for tower in _towers(config)])


def _towers(config: LlavaNpuConfig) -> Sequence[Tower]:
    return config.tower.members or (config.tower,)


def _one_for_all(values: list[Any]) -> Any:
    """What all towers have, or the list of what each has."""
    return values[0] if all(value == values[0] for value in values) else values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
