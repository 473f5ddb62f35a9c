"""Vision features of images, each computed once while it is likely to be needed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from llava_npu.evaluation.images import ImageSource, UnreadableImageError

MAX_IMAGES = 256  # of CLIP-L/336 in 16 bits: 300 MB


class FeatureCache:
    """The vision tower's output for the images seen last, in host memory.

    All rotations of a question, and all its options when they are scored, see one image: the tower runs once.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_images: int = MAX_IMAGES,
        kept: OrderedDict[str, torch.Tensor] | None = None,
    ):
        """
        Args:
            model, processor: as `llava_npu.models.load` gives them.
            max_images: how many images' features are kept.
            kept: where; given the same one, models with the same tower and preprocessing share them.
        """
        self._model = model
        self._processor = processor
        self._max_images = max_images
        self._features = OrderedDict() if kept is None else kept  # key → (tokens, channels)

    def load(self, images: Sequence[ImageSource]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Features of the distinct images: key → (tokens, channels) on the host; and key → error of unreadable ones."""
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
    def _encode(self, images: Sequence[Any]) -> torch.Tensor:
        pixel_values = self._processor.preprocess_images(images)  # (images, 3, height, width)
        return self._model.encode_images(pixel_values.to(self._model.device)).cpu()  # (images, tokens, channels)


def stack_features(
    images: Sequence[Sequence[ImageSource]], features: dict[str, torch.Tensor], device: torch.device
) -> torch.Tensor | None:
    """The features of a batch's images in the order of its texts: (images, tokens, channels); None without images."""
    keys = [image.key for of_one in images for image in of_one]
    return torch.stack([features[key] for key in keys]).to(device) if keys else None
