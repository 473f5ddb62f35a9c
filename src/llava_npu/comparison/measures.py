"""What is measured of a model in addition to its answers: size, work, speed, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_npu.comparison.results import Estimate, StageResult
from llava_npu.data.image_roots import ImagePath
from llava_npu.data.image_sources import EmbeddedImage, ImageFile, ImageSource
from llava_npu.data.images import image_size
from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.features import FeatureCache, ImageFeatures
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.inference.request import Request, Sampling
from llava_npu.models.flops import causal_pairs, flop_model
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.vision.anyres import TYPICAL
from llava_npu.models.vision.feature_cache import FeatureStore, open_feature_cache, space_left
from llava_npu.training.monitoring.metrics import read_metrics

PROMPT = "<image>\nWhat is in the image?"
_REPEATS = 9
_WARM_UP = 2


def parameters(model: LlavaNpuForConditionalGeneration) -> dict[str, int]:
    """Parameters of each part; the language model's head, where it has its own weights, is counted with it."""
    counts = {"vision_tower": 0, "projector": 0, "language_model": 0}
    for name, parameter in model.named_parameters():
        part = next((part for key, part in _PARTS.items() if name.startswith(key)), "language_model")
        counts[part] += parameter.numel()
    return counts


_PARTS = {"model.vision_tower.": "vision_tower", "model.multi_modal_projector.": "projector"}


def flops_per_image(model: LlavaNpuForConditionalGeneration) -> dict[str, int]:
    """Floating-point operations of one image's forward pass, two per multiply-add; see `models/flops.py`.

    With anyres, of a image of `anyres.TYPICAL` pixels.

    Returns:
        of the vision tower, the projector, and the language model as it reads the image's tokens.
    """
    cost, tokens, tiling = flop_model(model).inference, visual_tokens(model), model.config.tiling
    tiles = 1 if tiling is None else tiling.num_tiles(TYPICAL)
    return {
        "vision_tower": tiles * cost.tower.total,
        "projector": tiles * cost.projector.total,
        "language_model": cost.count(tokens, causal_pairs([tokens]), supervised=0, images=0).total,
    }


def visual_tokens(model: LlavaNpuForConditionalGeneration) -> int:
    """Tokens that an image takes in the text; with anyres, one of `anyres.TYPICAL` pixels."""
    return model.config.count_image_tokens(TYPICAL)


def stage_result(folder: Path, peak_memory: int | None) -> StageResult:
    """What a finished run's metrics say."""
    lines = read_metrics(folder)
    if not lines:
        raise UserError(f"{folder} holds no metrics of a run; was it trained?")
    last = lines[-max(1, len(lines) // 10) :]
    # Speed: the median over steps, so that the first one (compilation, caches) and pauses of the machine do not count.
    timed = lines[1:] or lines
    return StageResult(
        steps=lines[-1]["step"],
        loss=statistics.fmean(line["loss"] for line in last if line["loss"] is not None),
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in timed),
        samples_per_second=statistics.median(line["samples_per_second"] for line in timed),
        peak_memory=peak_memory,
    )


def first_token(loaded: LoadedModel, device: Device) -> Estimate:
    """Milliseconds from a prepared image and a short question to the answer's first token, one at a time.

    Vision tower, projector, the whole prompt through the language model, one token chosen. The image is blank, for
    what it shows makes no difference, and has `anyres.TYPICAL` pixels.

    Returns:
        the median, and the range of the middle half.
    """
    height, width = TYPICAL
    image = Image.new("RGB", (width, height), "white")
    # Nothing is kept from one time to the next.
    engine = InferenceEngine(loaded, max_batch=1, prefix_tokens=0, features=FeatureCache(loaded, max_images=0))
    prompt = prepare_prompt(loaded.processor, [{"from": "human", "value": PROMPT}], [image])
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        device.synchronize()
        started = time.perf_counter()
        engine.run([Request(prompt, Sampling(max_new_tokens=1))])
        device.synchronize()
        seconds.append(1000 * (time.perf_counter() - started))
    low, middle, high = statistics.quantiles(seconds[_WARM_UP:], n=4)
    return Estimate(middle, low, high, _REPEATS)


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
