"""What a frozen vision tower gives for each image, computed once and kept on disk.

A tower that is not trained gives the same features in every epoch, stage and experiment. They are kept one file per
image, under a name made of the tower's weights, its preprocessing and the image's own bytes: nothing stale is ever
read, an interrupted computation resumes, and runs share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llava_npu.data.image_roots import ImagePath
from llava_npu.data.images import image_size, load_image
from llava_npu.errors import UserError
from llava_npu.files.atomic import replacing
from llava_npu.files.cache import cache_root, locked_in_cache
from llava_npu.files.locks import LOCK
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration

# What a library notes of itself or of where a model came from; the weights' own type is counted with them.
_OF_NO_EFFECT = ("dtype", "transformers_version", "_name_or_path", "_attn_implementation")
_BATCH = 16  # images
_LEFT_FREE = 2 * 2**30  # bytes of the disk that a cache leaves to others


class FeatureStore:
    """From an image's path to its features, (tiles, tokens, channels); read from disk when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[ImagePath, Path] = {}

    def __getitem__(self, image: ImagePath) -> torch.Tensor:
        file = self._file(image)
        features = load_file(file)["features"]
        if not features.isfinite().all():
            file.unlink()
            raise UserError(
                f"{image}: its vision features in {file} were not all finite numbers. The file is deleted: start again "
                "to compute them again."
            )
        return features

    def __contains__(self, image: ImagePath) -> bool:
        """Whether its file is there and whole; a damaged one is computed again."""
        try:
            with safe_open(self._file(image), framework="pt") as file:  # its head says how long it is and what it holds
                return list(file.keys()) == ["features"]
        except (OSError, SafetensorError):
            return False

    def put(self, image: ImagePath, features: torch.Tensor) -> None:
        """Keeps the features (tiles, tokens, channels) of an image.

        Raises:
            UserError: they are not all finite, or cannot be written.
        """
        if not features.isfinite().all():
            raise UserError(
                f"{image}: its vision features are not all finite numbers. Compute in fp32 (`precision`), or take the "
                "vision tower's weights again."
            )
        file = self._file(image)
        with replacing(file) as temporary:
            save_file({"features": features.cpu().contiguous()}, temporary)

    def _file(self, image: ImagePath) -> Path:
        if image not in self._files:
            try:
                name = hashlib.sha256(image.read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"{image}: cannot be read: {error.strerror}") from error
            self._files[image] = self.folder / name[:2] / f"{name}.safetensors"
        return self._files[image]


def open_feature_cache(loaded: LoadedModel) -> FeatureStore:
    """The cache that belongs to this tower, layer choice and preprocessing."""
    model, processor = loaded
    recipe = {
        "layers": model.config.feature_layers,
        "keep_prefix_tokens": model.config.keep_prefix_tokens,
        "scales": model.config.scales,
        "image_aspect_ratio": processor.image_aspect_ratio,
        "image_grid_pinpoints": model.config.image_grid_pinpoints,
        "image_processor": processor.image_processor.to_dict(),
        "vision_config": _of_effect(model.config.vision_config.to_dict()),
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return FeatureStore(cache_root() / "features" / digest.hexdigest()[:16])


def _of_effect(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _of_effect(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _OF_NO_EFFECT
    }


def fill_feature_cache(
    cache: FeatureStore,
    loaded: LoadedModel,
    images: Sequence[ImagePath],
    report: Callable[[int], None],
    skip_bad: bool = False,
) -> None:
    """Computes the features of those images that the cache lacks; `report` is told how many more are done.

    With `skip_bad`, images that cannot be read stay out of the cache. One process fills a cache at a time: another that
    needs the same features waits, and finds them.
    """
    with locked_in_cache(cache.folder / LOCK):
        model, processor = loaded
        parameter = next(model.model.vision_tower.parameters())
        missing = [image for image in dict.fromkeys(images) if not _has(cache, image, skip_bad)]
        report(len(images) - len(missing))
        for batch in _batches(missing, _BATCH):
            decoded = {image: pixels for image in batch if (pixels := _load(image, skip_bad)) is not None}
            if decoded:
                tiles = [processor.preprocess_images([pixels]) for pixels in decoded.values()]
                with torch.no_grad():
                    features = model.encode_images(torch.cat(tiles).to(parameter.device, parameter.dtype))
                for image, of_image in zip(decoded, features.split([len(each) for each in tiles]), strict=True):
                    cache.put(image, of_image)
            report(len(batch))


def space_needed(
    cache: FeatureStore,
    model: LlavaNpuForConditionalGeneration,
    images: Sequence[ImagePath],
    skip_bad: bool = False,
) -> int:
    """Bytes on disk that filling the cache will take, for the images that it lacks."""
    config, parameter = model.config, next(model.model.vision_tower.parameters())
    tokens = config.tower.num_patches + (config.tower.num_prefix_tokens if config.keep_prefix_tokens else 0)
    missing = (image for image in dict.fromkeys(images) if not _has(cache, image, skip_bad))
    tiles = sum(_num_tiles(config, image, skip_bad) for image in missing)
    return tiles * tokens * model.model.multi_modal_projector.input_channels * parameter.element_size()


def _num_tiles(config: LlavaNpuConfig, image: ImagePath, skip_bad: bool) -> int:
    """As how many tiles an image passes the tower; none if it cannot be read and bad images are skipped."""
    tiling = config.tiling
    if tiling is None:
        return 1
    try:
        return tiling.num_tiles(image_size(image, str(image)))
    except UserError:
        if not skip_bad:
            raise
        return 0


def space_left(cache: FeatureStore) -> int:
    """Bytes that the cache may still take of its disk."""
    folder = next(each for each in (cache.folder, *cache.folder.parents) if each.exists())
    return shutil.disk_usage(folder).free - _LEFT_FREE


def _has(cache: FeatureStore, image: ImagePath, skip_bad: bool) -> bool:
    try:
        return image in cache
    except UserError:  # its bytes, by which it is looked up, cannot be read
        if not skip_bad:
            raise
        return False


def _load(image: ImagePath, skip_bad: bool) -> Image.Image | None:
    try:
        return load_image(image, str(image))
    except UserError:
        if not skip_bad:
            raise
        return None


def _batches(items: Sequence[ImagePath], size: int) -> Iterable[Sequence[ImagePath]]:
    return (items[start : start + size] for start in range(0, len(items), size))
