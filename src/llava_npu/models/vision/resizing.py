"""Making a pretrained tower and its image processor agree on a size of images.

A transformer's learned table of positions fits one grid of patches. For images of another size the table is
interpolated once (bicubic, as transformers' `interpolate_pos_encoding` and DINOv2 do at every call), so that the model
that is saved is an ordinary one of the new size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModel

from llava_npu.errors import UserError
from llava_npu.hub.folders import check_loaded
from llava_npu.models.checkpoints.mapped import with_weights
from llava_npu.models.vision.image_processors import Size, processor_size, set_processor_size
from llava_npu.models.vision.towers import Tower, describe_tower

# They interpolate their positions by themselves, and are published with images smaller than their table is for.
_ANY_SIZE = ("dinov2", "dinov2_with_registers")
_ANTIALIASED = ("dinov2_with_registers",)  # they do so with a filter that the others do without


def fit_tower(tower: Any, image_processor: Any, image_size: int | None, *, mapped: bool = False) -> tuple[Any, Any]:
    """The tower and the image processor for images of one size.

    Args:
        tower, image_processor: as transformers loads them.
        image_size: pixels per side; None takes the image processor's size.
        mapped: as for `resize_tower`.

    Raises:
        UserError: the size is not the tower's and its positions cannot be interpolated, or nobody asked for that.
    """
    size = input_size(tower.config, image_processor, image_size)
    if not hasattr(tower.config, "image_size"):  # a convolutional tower takes any size
        set_size(tower.config, size)
    if describe_tower(tower.config).image_size != size:
        tower = resize_tower(tower, size, mapped=mapped)
    return tower, image_processor if image_size is None else set_processor_size(image_processor, size)


def sizes_of_towers(image_size: int | Sequence[int] | None, num_towers: int) -> list[int | None]:
    """`model.image_size` for each tower: one number is that of all."""
    if not isinstance(image_size, Sequence):
        return [image_size] * num_towers
    if len(image_size) != num_towers:
        raise UserError(f"model.image_size: {len(image_size)} sizes for {num_towers} vision tower(s).")
    return list(image_size)


def input_size(config: Any, image_processor: Any, image_size: int | None) -> Size:
    """(height, width) of the images that a tower of this configuration will see; arguments as for `fit_tower`."""
    made = processor_size(image_processor)
    if image_size is not None:
        return image_size, image_size
    if made is None:
        raise UserError(
            "model.vision_tower: its image processor keeps each image's own shape; say with model.image_size how "
            "many pixels a side should have."
        )
    if hasattr(config, "image_size"):
        described = describe_tower(config)
        if described.image_size != made and not described.last_layer_only and described.kind not in _ANY_SIZE:
            raise UserError(
                f"model.vision_tower: its image processor makes images of {_by(made)} pixels, but it takes "
                f"{_by(described.image_size)}. Choose with model.image_size; its positions are interpolated to fit."
            )
    return made


def set_size(config: Any, size: Size) -> None:
    """Writes (height, width) into a tower's configuration in the form that it has there."""
    old = getattr(config, "image_size", None)
    config.image_size = size[0] if isinstance(old, int) and size[0] == size[1] else list(size)


def resize_tower(tower: Any, size: Size, *, mapped: bool = False) -> Any:
    """The same tower for images of another (height, width): tables of positions are interpolated.

    Args:
        mapped: leave all other weights where and what they are; the tables become float32.

    Raises:
        UserError: its weights depend on the size in another way.
    """
    config = copy.deepcopy(tower.config)
    set_size(config, size)
    old, new = describe_tower(tower.config), describe_tower(config)
    with torch.device("meta"):
        resized = AutoModel.from_config(config)
    shapes = {name: tensor.shape for name, tensor in resized.state_dict().items()}
    weights = tower.state_dict()
    for name, weight in weights.items():
        if weight.shape != shapes[name]:
            weights[name] = _interpolate(name, weight.float() if mapped else weight, old, new)
            if weights[name].shape != shapes[name]:
                raise _cannot_resize(name, old)
    with torch.random.fork_rng(devices=[]):
        resized, info = with_weights(type(tower), config, weights)
    check_loaded(info, "model.vision_tower", tower.config.name_or_path)
    return (resized if mapped else resized.to(tower.dtype)).train(tower.training)


def _interpolate(name: str, table: torch.Tensor, old: Tower, new: Tower) -> torch.Tensor:
    """(…, special + patches, channels) for the old grid → for the new one."""
    num_special = table.shape[-2] - old.num_patches if table.ndim >= 2 else -1
    if num_special not in (0, 1, 2) or table.numel() != table.shape[-2] * table.shape[-1]:
        raise _cannot_resize(name, old)
    flat = table.reshape(table.shape[-2:])
    special, patches = flat[:num_special], flat[num_special:]
    image = patches.float().reshape(1, *old.grid, -1).permute(0, 3, 1, 2)  # (1, channels, rows, columns)
    stretched = F.interpolate(image, size=new.grid, mode="bicubic", antialias=old.kind in _ANTIALIASED)
    rows = torch.cat([special, stretched.flatten(2)[0].T.to(table.dtype)])
    return rows.reshape(*table.shape[:-2], *rows.shape).contiguous()


def _cannot_resize(name: str, tower: Tower) -> UserError:
    return UserError(
        f"model.image_size: {name} of a {tower.kind} tower is not a table of positions for {_by(tower.grid)} patches "
        f"that could be interpolated; leave the size as it is, {_by(tower.image_size)}."
    )


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]}×{pair[1]}"
