"""The frozen tower's output for all images of a run, computed once and kept on disk (`data.cache_features`)."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import Progress

from llava_npu.config.schema import DataConfig
from llava_npu.errors import UserError
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.vision.feature_cache import (
    FeatureStore,
    fill_feature_cache,
    open_feature_cache,
    space_left,
    space_needed,
)
from llava_npu.training.data import RunData, images_of


def cache_features(
    loaded: LoadedModel, data: RunData, settings: DataConfig, accelerator: Accelerator, console: Console
) -> FeatureStore | None:
    """The run's feature cache, filled; None where `cache_features: auto` finds too little space on the disk.

    Raises:
        UserError: there is too little space and `cache_features` is true.
    """
    images = images_of(data, settings.bad_samples)
    skip_bad = settings.bad_samples == "skip"
    cache = open_feature_cache(loaded)
    needed, left = space_needed(cache, loaded.model, images, skip_bad), space_left(cache)
    if max(gather_object([needed > left])):  # one decision for all processes
        problem = f"vision features of {len(images):,} images need {needed / 2**30:.1f} GiB more in {cache.folder}, "
        problem += f"where {max(left, 0) / 2**30:.1f} GiB can be taken"
        if settings.cache_features == "auto":
            console.print(f"{problem}: they are computed in every pass.")
            return None
        raise UserError(f"data.cache_features: {problem}. Free some space, move the cache, or set it to false.")
    loaded.model.model.vision_tower.to(accelerator.device)
    with accelerator.main_process_first(), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("vision features", total=len(images))
        fill_feature_cache(cache, loaded, images, report=lambda count: progress.advance(task, count), skip_bad=skip_bad)
    return cache
