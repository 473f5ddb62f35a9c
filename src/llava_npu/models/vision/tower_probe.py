"""Finding out what a vision tower gives by running it, for kinds of tower that `towers.py` does not know by name.

Which tokens of a transformer are patches, and in which order, is not in its configuration. So it is asked: one image
goes through its first layer, then the same image with one patch changed; the token that changes is that patch's.
Weights play no part in it, so the tower is built small (one layer) with random ones; a second one without memory
(torch's meta device) tells the shapes of all layers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from transformers import AutoModel

from llava_npu.errors import UserError


@dataclass(frozen=True)
class Probe:
    """What a tower was seen to give for one image at its configured size.

    Attributes:
        hidden_size: channels of a token.
        num_layers: `hidden_states` holds one more.
        grid: (rows, columns) of patch tokens.
        num_prefix_tokens: tokens in front of them.
        last_layer_only: layers differ in shape; only the last is usable.
    """

    hidden_size: int
    num_layers: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    last_layer_only: bool


def probe_tower(vision_config: Any, image_size: tuple[int, int]) -> Probe:
    """Runs the tower of a transformers vision configuration on one image of (height, width).

    Raises:
        UserError: transformers cannot build it, it takes something other than images, or its output is not a map of
            patches, perhaps with special tokens in front.
    """
    return _probe(cast(Hashable, type(vision_config)), vision_config.to_json_string(use_diff=False), image_size)


@lru_cache(maxsize=32)
def _probe(config_class: Any, values: str, image_size: tuple[int, int]) -> Probe:
    config = config_class.from_dict(json.loads(values))
    shapes = _shapes(config, image_size)
    if len(shapes[-1]) == 4:  # a convolutional network: (images, channels, rows, columns)
        _, channels, rows, columns = shapes[-1]
        return Probe(channels, len(shapes) - 1, (rows, columns), 0, True)
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise _unfit(config, f"its layers give differing shapes ({_listed(shapes)}), and the last is not an image")
    _, tokens, channels = shapes[0]
    height, width = _patch_size(config)
    grid = (image_size[0] // height, image_size[1] // width)
    prefix = _first_patch(config, image_size, (height, width), grid, tokens)
    return Probe(channels, len(shapes) - 1, grid, prefix, False)


def _shapes(config: Any, image_size: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes of all hidden states, without computing anything."""
    with torch.device("meta"):
        return [tuple(state.shape) for state in _run(config, torch.zeros(1, 3, *image_size))]


def _first_patch(
    config: Any, image_size: tuple[int, int], patch: tuple[int, int], grid: tuple[int, int], tokens: int
) -> int:
    """The index of the token of the upper left patch, checked at three more patches."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        image = torch.rand(1, 3, *image_size)
        model = _build(small)
        before = _hidden_states(small, model, image)[0]

        def token_of(row: int, column: int) -> list[int]:
            changed = image.clone()
            changed[..., row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]] += 1
            after = _hidden_states(small, model, changed)[0]
            return (after != before).any(-1)[0].nonzero().flatten().tolist()

        rows, columns = grid
        corners = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)]
        found = [token_of(*corner) for corner in corners]
    first = found[0][0] if len(found[0]) == 1 else -1
    expected = [[first + row * columns + column] for row, column in corners]
    if first < 0 or found != expected or first + rows * columns != tokens:
        raise _unfit(
            config,
            f"an image of {rows}×{columns} patches gives {tokens} tokens, which are not special tokens followed by "
            "the patches row by row",
        )
    return first


def _run(config: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _hidden_states(config, _build(config), pixel_values)


def _build(config: Any) -> Any:
    try:
        return AutoModel.from_config(config).eval()
    except Exception as error:  # whatever a model's code raises for a configuration that it cannot be built from
        raise _unfit(config, f"transformers' AutoModel cannot build it ({_first_line(error)})") from error


@torch.no_grad()
def _hidden_states(config: Any, model: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    try:
        states = model(pixel_values, output_hidden_states=True).hidden_states
    except Exception as error:  # as above, for input that it cannot take
        raise _unfit(config, f"it does not take images of fixed size ({_first_line(error)})") from error
    if not states:
        raise _unfit(config, "it gives no hidden states")
    return tuple(states)


def _patch_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "patch_size", None)
    if size is None:
        raise _unfit(config, "its configuration names no patch_size")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _unfit(config: Any, reason: str) -> UserError:
    hint = ""
    if config.model_type.startswith("siglip2"):
        hint = (
            " Of SigLIP 2, take a fixed-resolution model such as google/siglip2-so400m-patch14-384; the NaFlex ones"
            " take images cut into patches beforehand."
        )
    return UserError(
        f"vision tower: model type {config.model_type!r} cannot be used: {reason}.{hint} CLIP, SigLIP, SigLIP 2 "
        "(fixed resolution), DINOv2, DINOv3, ViT and ResNet can, among others; docs/encoders.md has the list."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape[1:])) for shape in dict.fromkeys(shapes))
