"""Vision features of images, each computed once while it is likely to be needed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llava_npu.data.image_sources import ImageSource, UnreadableImageError
from llava_npu.inference.request import ImageInput
from llava_npu.models.loaded import LoadedModel

MAX_IMAGES = 256  # of CLIP-L/336 in 16 bits: 300 MB
_PIXELS_AT_ONCE_ON_HOST = 150_000  # one image of 384 × 384, or three of 224 × 224


def _tiles_at_once(pixels: torch.Tensor, device: torch.device) -> int:
    """A host's matrix products are no faster for more rows than one image has; (tiles, channels, height, width)."""
    if device.type != "cpu":
        return len(pixels)
    return max(1, _PIXELS_AT_ONCE_ON_HOST // pixels[0, 0].numel())


def image_inputs(images: Sequence[ImageSource], features: Mapping[str, ImageFeatures]) -> list[ImageInput]:
    """Images whose features are known, not yet placed in a prompt."""
    return [
        ImageInput(image.key, features[image.key].size, 0, 0, features=features[image.key].tensor) for image in images
    ]


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
        pixels, sizes, errors = {}, {}, {}
        for key, source in distinct.items():
            if key not in found:
                try:
                    image = source.open()
                except UnreadableImageError as error:
                    errors[key] = str(error)
                    continue
                pixels[key] = self._processor.preprocess_images([image])
                sizes[key] = (image.height, image.width)
        return self._keep(found | self._encode(pixels, sizes)), errors

    def encode(self, images: Iterable[ImageInput]) -> list[torch.Tensor]:
        """Features of each image of some prompts, (tiles, tokens, channels) on the host."""
        images = list(images)
        found = {image.key: self._features[image.key] for image in images if image.key in self._features}
        pixels, sizes = {}, {}
        for image in images:
            if image.features is None and image.key not in found:
                assert image.pixel_values is not None
                pixels[image.key], sizes[image.key] = image.pixel_values, image.size
        found = self._keep(found | self._encode(pixels, sizes))
        return [found[image.key].tensor if image.features is None else image.features for image in images]

    def _keep(self, found: dict[str, ImageFeatures]) -> dict[str, ImageFeatures]:
        for key, feature in found.items():
            self._features[key] = feature
            self._features.move_to_end(key)
        while len(self._features) > self._max_images:
            self._features.popitem(last=False)
        return found

    @torch.no_grad()
    def _encode(self, pixels: dict[str, torch.Tensor], sizes: dict[str, tuple[int, int]]) -> dict[str, ImageFeatures]:
        """`pixels`: (tiles, 3, height, width) of each image."""
        if not pixels:
            return {}
        together = torch.cat(list(pixels.values()))
        device = self._model.device
        passes = together.split(_tiles_at_once(together, device))
        features = torch.cat([self._model.encode_images(each.to(device)).cpu() for each in passes])
        parts = features.split([len(each) for each in pixels.values()])  # (tiles, tokens, channels) each
        return {key: ImageFeatures(part, sizes[key]) for key, part in zip(pixels, parts, strict=True)}
