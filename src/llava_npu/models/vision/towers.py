"""What the rest of the code may ask of a vision tower.

Every question about grids, special tokens and layers is answered here, from the tower's configuration alone, so that
no other file knows that CLIP puts a class token in front, that SigLIP has none, that DINOv2 adds registers, or that a
convolutional network returns an image-shaped feature map. The kinds that most people use are described below; any
other that transformers' `AutoModel` builds is asked, by running it (`tower_probe.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_npu.errors import UserError
from llava_npu.models.projectors.grid import to_blocks


@dataclass(frozen=True)
class Tower:
    """A vision tower seen from outside.

    Attributes:
        kind: transformers' `model_type`, as in "clip_vision_model".
        hidden_size: channels of a token; of two towers all that lies in a place of `grid`.
        num_layers: how many blocks (for a convolutional tower: stages) there are; `hidden_states` holds one more.
        image_size: (height, width) in pixels of the images that it takes.
        grid: (rows, columns) of its patch tokens at that size; of two towers, the finest into which both fit.
        num_prefix_tokens: special tokens (class token, registers) in front of the patch tokens.
        last_layer_only: its layers differ in shape, so that only the last can feed a projector.
        members: of two towers in one model (`two_towers.py`), each; this is then what they are together.
    """

    kind: str
    hidden_size: int
    num_layers: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix_tokens: int
    last_layer_only: bool = False
    members: tuple[Tower, ...] = ()

    @property
    def pixels(self) -> tuple[int, int, int]:
        """(channels, height, width) of what it takes: three channels for each tower."""
        return 3 * max(1, len(self.members)), *self.image_size

    @property
    def shapes(self) -> list[tuple[int, tuple[int, int]]]:
        """Channels and grid of each tower."""
        return [(each.hidden_size, each.grid) for each in self.members or (self,)]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


def describe_tower(vision_config: Any) -> Tower:
    """Describes the tower that a transformers vision configuration builds."""
    return _DESCRIBE.get(vision_config.model_type, _asked)(vision_config)


def select_features(
    outputs: Any, tower: Tower, layers: Sequence[int], keep_prefix_tokens: bool = False
) -> list[torch.Tensor]:
    """Picks the tower's features: the given hidden states, without special tokens.

    Args:
        outputs: what the tower returned, with `hidden_states`; of two towers, those of each.
        tower: its description.
        layers: indices into `hidden_states` (−2 is LLaVA's choice for CLIP).
        keep_prefix_tokens: keep the special tokens (LLaVA's `cls_patch`, transformers' `full`).

    Returns:
        of each layer (images, tokens, channels), patch tokens in row-major order of the grid.
    """
    return _select(outputs.hidden_states, tower, layers, keep_prefix_tokens)


def _select(
    hidden_states: Any, tower: Tower, layers: Sequence[int], keep_prefix_tokens: bool = False
) -> list[torch.Tensor]:
    if tower.members:
        of_each = [
            [_folded(layer, each, tower) for layer in _select(states, each, layers)]
            for states, each in zip(hidden_states, tower.members, strict=True)
        ]
        return [torch.cat(layer, dim=-1) for layer in zip(*of_each, strict=True)]
    first = 0 if keep_prefix_tokens else tower.num_prefix_tokens
    return [_as_tokens(hidden_states[layer])[:, first:] for layer in layers]


def _folded(tokens: torch.Tensor, tower: Tower, both: Tower) -> torch.Tensor:
    """The patches of one tower on the grid of both; where its own is finer, those of a place side by side."""
    scale = tower.grid[0] // both.grid[0]
    return tokens if scale == 1 else to_blocks(tokens, tower.grid, scale).flatten(2)


def check_layers(tower: Tower, layers: int | Sequence[int]) -> None:
    """Raises `UserError` if a layer index is outside the tower's hidden states, or those of any of two towers."""
    for member in tower.members:
        check_layers(member, layers)
    if tower.members:
        return
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -(tower.num_layers + 1) <= layer <= tower.num_layers:
            raise UserError(
                f"vision_feature_layer {layer}: the {tower.kind} tower has {tower.num_layers} layers; "
                f"allowed are {-(tower.num_layers + 1)} to {tower.num_layers} (0 is the embedding, −1 the last layer)."
            )
        if tower.last_layer_only and layer not in (-1, tower.num_layers):
            raise UserError(
                f"vision_feature_layer {layer}: the stages of a {tower.kind} tower differ in grid and channels; use −1."
            )


def _as_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
    # A convolutional tower's hidden state is (images, channels, rows, columns); a transformer's already is tokens.
    return hidden_state.flatten(2).transpose(1, 2) if hidden_state.ndim == 4 else hidden_state


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _asked(config: Any) -> Tower:
    from llava_npu.models.vision.tower_probe import (
        probe_tower,  # loads transformers' models, which the others do not need
    )

    image_size = _pair(getattr(config, "image_size", None) or 224)
    seen = probe_tower(config, image_size)
    return Tower(
        kind=config.model_type,
        hidden_size=seen.hidden_size,
        num_layers=seen.num_layers,
        image_size=image_size,
        grid=seen.grid,
        num_prefix_tokens=seen.num_prefix_tokens,
        last_layer_only=seen.last_layer_only,
    )


def _patched(config: Any, num_prefix_tokens: int) -> Tower:
    height, width = _pair(config.image_size)
    patch_height, patch_width = _pair(config.patch_size)
    return Tower(
        kind=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        image_size=(height, width),
        grid=(height // patch_height, width // patch_width),
        num_prefix_tokens=num_prefix_tokens,
    )


def _with_class_token(config: Any) -> Tower:
    return _patched(config, num_prefix_tokens=1)


def _without_class_token(config: Any) -> Tower:
    return _patched(config, num_prefix_tokens=0)


def _with_registers(config: Any) -> Tower:
    return _patched(config, num_prefix_tokens=1 + config.num_register_tokens)


def _resnet(config: Any) -> Tower:
    # Stem and pooling divide by 4, each stage after the first by 2 (and the first too, if so configured).
    stages = len(config.depths)
    stride = 4 * 2 ** (stages - 1 + int(config.downsample_in_first_stage))
    # The network takes any size; composing a model writes the image processor's size into the configuration.
    height, width = _pair(getattr(config, "image_size", 224))
    return Tower(
        kind=config.model_type,
        hidden_size=config.hidden_sizes[-1],
        num_layers=stages,
        image_size=(height, width),
        grid=(-(-height // stride), -(-width // stride)),
        num_prefix_tokens=0,
        last_layer_only=True,
    )


def _two_towers(config: Any) -> Tower:
    members = (describe_tower(config.first), describe_tower(config.second))
    first, second = members
    rows, columns = (math.gcd(*sides) for sides in zip(first.grid, second.grid, strict=True))
    return Tower(
        kind=config.model_type,
        hidden_size=sum(each.num_patches // (rows * columns) * each.hidden_size for each in members),
        num_layers=max(first.num_layers, second.num_layers),
        image_size=(
            max(first.image_size[0], second.image_size[0]),
            max(first.image_size[1], second.image_size[1]),
        ),
        grid=(rows, columns),
        num_prefix_tokens=0,  # each tower's own stay behind
        last_layer_only=first.last_layer_only or second.last_layer_only,
        members=members,
    )


def require_one_grid(config: Any) -> None:
    """Raises `UserError`, naming sizes of images that would do, unless two towers have patches in the same places."""
    members = describe_tower(config).members
    if len({each.grid for each in members}) > 1:
        raise UserError(
            f"vision_tower: the patches of the two towers do not meet: {', '.join(map(_seen, members))}. "
            f"{_sizes_that_meet((config.first, config.second), members)} Or take projector 'sva', which reads each "
            "tower by itself."
        )


def _seen(tower: Tower) -> str:
    (rows, columns), (height, width) = tower.grid, tower.image_size
    return f"{tower.kind} makes {rows}×{columns} of {height}×{width} pixels"


def _sizes_that_meet(configs: Sequence[Any], towers: Sequence[Tower]) -> str:
    """Which `image_size` gives both towers one grid: that of either of them."""
    patches = [
        _pair(getattr(config, "patch_size", None) or tower.image_size[0] // tower.grid[0])[0]
        for config, tower in zip(configs, towers, strict=True)
    ]
    choices = []
    for kept in towers:
        side, pixels = kept.grid[0], kept.image_size[0]
        sizes = [pixels if pixels // patch == side else side * patch for patch in patches]
        sizes = sizes[:1] if sizes[0] == sizes[1] else sizes
        choices.append(f"`image_size: {sizes if len(sizes) > 1 else sizes[0]}` ({side}×{side} patches)")
    return f"They meet with {' or '.join(choices)}."


_DESCRIBE: dict[str, Callable[[Any], Tower]] = {
    "clip_vision_model": _with_class_token,
    "siglip_vision_model": _without_class_token,
    "dinov2": _with_class_token,
    "dinov2_with_registers": _with_registers,
    "resnet": _resnet,
    "llava_npu_two_towers": _two_towers,
}
