"""Vision features of images, each computed once while it is likely to be needed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava_npu.data.image_sources import ImageSource, UnreadableImageError
from llava_npu.models.loaded import LoadedModel

MAX_IMAGES = 256  # of CLIP-L/336 in 16 bits: 300 MB
_TOKENS_AT_ONCE_ON_HOST = 1024
_PIXELS_AT_ONCE_ON_HOST = 150_000  # one picture of 384 × 384, or three of 224 × 224


def tokens_at_once(device: torch.device) -> int | None:
    """How many tokens a pass should hold at most; None for as many as there are.

    A host's matrix products are no faster for more rows than one long prompt or picture has, and all else is slower
    once what it works on has left the caches.
    """
    return _TOKENS_AT_ONCE_ON_HOST if device.type == "cpu" else None


def _tiles_at_once(pixels: torch.Tensor, device: torch.device) -> int:
    """The same of pictures, (tiles, channels, height, width)."""
    if device.type != "cpu":
        return len(pixels)
    return max(1, _PIXELS_AT_ONCE_ON_HOST // pixels[0, 0].numel())


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower gives for one image.

    Attributes:
        tensor: (tiles, tokens, channels) on the host; an image is one tile unless the model cuts it (anyres).
        size: of the image, (height, width).
    """

    tensor: torch.Tensor
    size: tuple[int, int]


class FeatureCache:
    """The vision tower's output for the images seen last, in host memory.

    All rotations of a question, and all its options when they are scored, see one image: the tower runs once.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_images: int = MAX_IMAGES,
        kept: OrderedDict[str, ImageFeatures] | None = None,
    ):
        """
        Args:
            loaded: the model, as `llava_npu.load` returns it.
            max_images: how many images' features are kept.
            kept: where; given the same one, models with the same tower and preprocessing share them.
        """
        self._model, self._processor = loaded
        self._max_images = max_images
        self._features = OrderedDict() if kept is None else kept

    def load(self, images: Sequence[ImageSource]) -> tuple[dict[str, ImageFeatures], dict[str, str]]:
        """Features of the distinct images, by key; and key → error of unreadable ones."""
        distinct = {image.key: image for image in images}
        found = {key: self._features[key] for key in distinct if key in self._features}
        opened, errors = {}, {}
        for key, image in distinct.items():
            if key not in found:
                try:
                    opened[key] = image.open()
                except UnreadableImageError as error:
                    errors[key] = str(error)
        if opened:
            found.update(zip(opened, self._encode(list(opened.values())), strict=True))
        for key, feature in found.items():
            self._features[key] = feature
            self._features.move_to_end(key)
        while len(self._features) > self._max_images:
            self._features.popitem(last=False)
        return found, errors

    @torch.no_grad()
    def _encode(self, images: Sequence[Image.Image]) -> list[ImageFeatures]:
        tiles = [self._processor.preprocess_images([image]) for image in images]  # (tiles, 3, height, width) each
        pixels = torch.cat(tiles)
        passes = pixels.split(_tiles_at_once(pixels, self._model.device))
        features = torch.cat([self._model.encode_images(each.to(self._model.device)).cpu() for each in passes])
        parts = features.split([len(each) for each in tiles])  # (tiles, tokens, channels) each
        return [ImageFeatures(part, (each.height, each.width)) for part, each in zip(parts, images, strict=True)]


def image_inputs(
    images: Sequence[Sequence[ImageSource]], features: Mapping[str, ImageFeatures], device: torch.device
) -> dict[str, Any]:
    """What the model takes for a batch's images, in the order of its texts; nothing without images."""
    found = [features[image.key] for of_one in images for image in of_one]
    if not found:
        return {}
    return {
        "vision_features": torch.cat([each.tensor for each in found]).to(device),
        "image_sizes": [each.size for each in found],
    }
