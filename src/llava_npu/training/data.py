"""The data of a run, from its configuration: one source or a mixture, opened, and checked where it is small; how it is
laid out in batches; and the frozen tower's output for its images, kept on disk (`data.cache_features`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import Progress

from llava_npu.config import DataConfig, RunConfig
from llava_npu.data.dataset import BadSamples, ConversationDataset
from llava_npu.data.formats.parsing import Record
from llava_npu.data.holdout import hold_out, leave_out
from llava_npu.data.image_roots import ImagePath, exists
from llava_npu.data.packing import PackedLayout, plan_packs
from llava_npu.data.plan import BatchLayout, PaddedLayout, Plan
from llava_npu.data.records import Source, fingerprint, open_sources
from llava_npu.data.token_counts import default_workers, load_token_counts
from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.vision.feature_cache import (
    FeatureStore,
    fill_feature_cache,
    open_feature_cache,
    space_left,
    space_needed,
)
from llava_npu.training.engines import Engine
from llava_npu.training.parts import kept_types, place_weights

# Checking this many takes seconds; more of them are checked as they are read.
CHECKED_AT_START = 100_000
_LOOK_UPS = 32  # at once: disks over a network answer many questions in the time of one
_CHUNK = 10_000
_SHOWN = 5


def sources(config: DataConfig) -> list[Source]:
    """What the run reads; `image_root` serves the sources that name none."""
    if config.path is not None:
        return [Source(config.path, config.image_root, allow_absolute_paths=config.allow_absolute_paths)]
    return [
        Source(
            source.path,
            source.image_root or config.image_root,
            source.weight,
            source.limit,
            config.allow_absolute_paths,
        )
        for source in config.sources
    ]


@dataclass(frozen=True)
class RunData:
    """The samples of one epoch, and those held out of it to validate on, if any.

    Attributes:
        left_out: samples that are not trained on because `data.validation.path` holds them too.
    """

    training: Sequence[Record]
    validation: Sequence[Record] | None
    left_out: int = 0


def open_run_data(config: DataConfig) -> RunData:
    """Opens the sources, and separates what is held out.

    Raises:
        UserError: a file cannot be read; or, in a set small enough to check here, a record is wrong and
            `bad_samples` is 'error'.
    """
    records = _opened(sources(config), config.bad_samples)
    validation = config.validation
    if validation is None:
        return RunData(records, None)
    if validation.path is not None:
        own = Source(
            validation.path,
            validation.image_root or config.image_root,
            allow_absolute_paths=config.allow_absolute_paths,
        )
        held = _opened([own], config.bad_samples)
        training = leave_out(records, held)
        return RunData(training, held, left_out=len(records) - len(training))
    return RunData(*hold_out(records, size=validation.size, fraction=validation.fraction))


def _opened(where: Sequence[Source], bad_samples: BadSamples) -> Sequence[Record]:
    records = open_sources(where)
    if bad_samples == "error" and len(records) <= CHECKED_AT_START:
        for _ in records:
            pass
    return records


def data_fingerprint(config: DataConfig) -> str:
    """Of the content of all sources, in their order."""
    held_out = [config.validation.path] if config.validation and config.validation.path else []
    return fingerprint(*(source.path for source in sources(config)), *held_out)


def images_of(data: RunData, bad_samples: BadSamples) -> list[ImagePath]:
    """All images of the run, each once; those of records that cannot be used are left out or, with 'error', raised."""
    images: dict[ImagePath, None] = {}
    for records in (data.training, data.validation or ()):
        for index in range(len(records)):
            try:
                images.update(dict.fromkeys(records[index].image_paths))
            except UserError:
                if bad_samples == "error":
                    raise
    return list(images)


def check_images(data: RunData, bad_samples: BadSamples) -> None:
    """Looks whether all images of the run are there, without opening them.

    Raises:
        UserError: some are missing, and `bad_samples` is 'error'.
    """
    if bad_samples == "skip":  # what is missing is replaced and reported in its step
        return
    named = ((record, image) for records in (data.training, data.validation or ()) for record, image in _named(records))
    missing: dict[ImagePath, str] = {}  # the first record that names it
    with ThreadPoolExecutor(_LOOK_UPS) as threads:
        while chunk := list(islice(named, _CHUNK)):
            found = _exist([image for _, image in chunk], threads)
            for (record, image), there in zip(chunk, found, strict=True):
                if not there:
                    missing.setdefault(image, record)
    if missing:
        shown = "".join(f"\n  {record}: image {image}" for image, record in islice(missing.items(), _SHOWN))
        more = f"\n  and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        raise UserError(
            f"data: {_images(len(missing))} not exist:{shown}{more}\n"
            "Put them there or correct data.image_root, or set data.bad_samples=skip to train on other samples instead."
        )


def _images(count: int) -> str:
    return "1 image does" if count == 1 else f"{count:,} images do"


def _named(records: Iterable[Record]) -> Iterator[tuple[str, ImagePath]]:
    return chain.from_iterable(((record.name, image) for image in record.image_paths) for record in records)


def _exist(images: Sequence[ImagePath], threads: ThreadPoolExecutor) -> list[bool]:
    """Whether each is there; files are looked up at once, members of archives in their index."""
    files = list({image for image in images if isinstance(image, Path)})
    there = dict(zip(files, threads.map(exists, files), strict=True))
    return [there[image] if isinstance(image, Path) else exists(image) for image in images]


def num_groups(config: RunConfig, num_devices: int) -> int:
    """How many groups of devices have batches of their own; those of a group work on each sequence together.

    Raises:
        UserError: the devices do not make whole groups.
    """
    size = config.sequence_parallel_size
    if num_devices % size:
        raise UserError(
            f"sequence_parallel_size: {size} does not divide the number of devices, {num_devices}. Start the run on a "
            f"multiple of {size} devices (--devices {size}), or set it to 1."
        )
    return num_devices // size


def image_token_choices(data: DataConfig, model: LlavaNpuConfig) -> Sequence[int] | None:
    """The numbers of tokens of which each training sample's images have one; None: all have the model's.

    Raises:
        UserError: the model cannot give them.
    """
    if data.image_tokens is None:
        return None
    if data.image_tokens == "all":
        choices = model.image_token_choices
        if len(choices) == 1:
            model.check_image_tokens([0], "data.image_tokens")
        return choices
    if not data.image_tokens:
        raise UserError("data.image_tokens: an empty list; name numbers of tokens, or set it to `all` or null.")
    model.check_image_tokens(data.image_tokens, "data.image_tokens")
    return data.image_tokens


def choose_layout(
    config: RunConfig,
    dataset: ConversationDataset,
    plan: Plan,
    data_fingerprint: str,
    num_processes: int,
    console: Console,
) -> BatchLayout:
    """The layout that the configuration names.

    Raises:
        UserError: the batch does not divide over the processes, or a sample does not fit into a pack.
    """
    groups = num_groups(config, num_processes)
    if config.pack_tokens is None:
        return PaddedLayout(plan, groups, min(config.micro_batch_size, config.batch_size // groups))
    mixture = [(source.weight, source.limit) for source in sources(config.data)]
    held_out = config.data.validation and config.data.validation.model_dump(include={"size", "fraction"})
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("counting tokens", total=len(dataset))
        counts = load_token_counts(
            dataset,
            [data_fingerprint, mixture, held_out],
            workers=default_workers(len(dataset)),
            report=lambda count: progress.advance(task, count),
        )
    return plan_packs(plan, counts, config.pack_tokens, groups)


def describe_layout(layout: BatchLayout, sequence_parallel_size: int) -> str | None:
    """What packing and splitting make of a step, in a line; None where there is neither."""
    split = f"each sequence is split over {sequence_parallel_size} devices"
    if not isinstance(layout, PackedLayout):
        return split if sequence_parallel_size > 1 else None
    packs = "pack" if layout.packs_per_process == 1 else "packs"
    return (
        f"{layout.packs_per_process} {packs} of {layout.pack_length} tokens per "
        f"{'device' if sequence_parallel_size == 1 else f'{sequence_parallel_size} devices'} and step, "
        f"{layout.fill():.1%} of them used{f'; {split}' if sequence_parallel_size > 1 else ''}"
    )


def cache_features(
    loaded: LoadedModel, data: RunData, settings: DataConfig, engine: Engine, console: Console
) -> FeatureStore | None:
    """The run's feature cache, filled; None where `cache_features: auto` finds too little space on the disk.

    Raises:
        UserError: there is too little space and `cache_features` is true.
    """
    accelerator, tower = engine.accelerator, loaded.model.model.vision_tower
    place_weights(tower, accelerator.device, kept_types(tower, engine.compute_dtype))
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
    with accelerator.main_process_first(), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("vision features", total=len(images))
        fill_feature_cache(cache, loaded, images, report=lambda count: progress.advance(task, count), skip_bad=skip_bad)
    return cache
