"""Images of a benchmark, whose features all trials with one encoder share on disk, as those of training are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_npu.data.image_roots import ImagePath
from llava_npu.data.image_sources import EmbeddedImage, ImageFile, ImageSource
from llava_npu.data.images import image_size
from llava_npu.inference.features import FeatureCache, ImageFeatures
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.vision.feature_cache import FeatureStore, open_feature_cache, space_left


class StoredFeatures(FeatureCache):
    """Features in memory that come from disk where another trial has computed them, and go there where none has."""

    def __init__(self, loaded: LoadedModel):
        super().__init__(loaded)
        self._store: FeatureStore = open_feature_cache(loaded)

    def load(self, images: Sequence[ImageSource]) -> tuple[dict[str, ImageFeatures], dict[str, str]]:
        """As `FeatureCache.load`."""
        new = {image.key: file for image in images if image.key not in self._features and (file := _file(image))}
        stored = {key for key, file in new.items() if file in self._store}
        for key in stored:
            self._features[key] = ImageFeatures(self._store[new[key]], image_size(new[key]))
        found, errors = super().load(images)
        if space_left(self._store) > 0:
            for key in new.keys() - stored - errors.keys():
                self._store.put(new[key], found[key].tensor)
        return found, errors


@dataclass(frozen=True)
class _InMemory:
    """An encoded image that reads like a file."""

    key: str
    data: bytes = field(repr=False, compare=False)

    def read_bytes(self) -> bytes:
        return self.data

    def is_file(self) -> bool:
        return True


def _file(image: ImageSource) -> ImagePath | None:
    """What the store knows the image by; None for one that is not a file's content."""
    if isinstance(image, EmbeddedImage):
        return _InMemory(image.key, image.data)
    return image.path if isinstance(image, ImageFile) and image.path.is_file() else None
