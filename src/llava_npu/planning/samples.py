"""How long a run's samples are: measured on its data if available, else known (`_DATA`), else assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_npu.config import RunConfig
from llava_npu.data.conversation.labels import IGNORE_INDEX, encode_conversation, expand_images
from llava_npu.data.dataset import ImageTokens
from llava_npu.data.formats.parsing import Record
from llava_npu.data.image_roots import ImagePath
from llava_npu.data.images import image_size
from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.vision.anyres import TYPICAL, Size
from llava_npu.training.data import image_token_choices, sources
from llava_npu.training.parts import STAGE_TEMPLATES
from llava_npu.training.resolve import ResolvedRun


@dataclass(frozen=True)
class PublishedData:
    """A published data set, as the means that a plan needs.

    Attributes:
        samples: conversations in the file, as its publisher counts them.
        images: images per sample, likewise.
        words: tokens per sample without the image's, and of them `supervised`; this project's estimates.
        longest: tokens without the image's of the longest samples; None: longer than any `max_length` in use.
    """

    samples: int
    images: float
    words: int
    supervised: int
    longest: int | None
    source: str


# By file name.
_DATA = {
    "blip_laion_cc_sbu_558k.json": PublishedData(
        558_128, 1.0, 26, 24, 128, "LLaVA-Pretrain (558,128 captions, estimated at 26 tokens in addition to the image)"
    ),
    "llava_v1_5_mix665k.json": PublishedData(
        665_298,
        0.939,
        184,
        100,
        None,
        "LLaVA's mix665k (665,298 conversations, 624,610 with an image; estimated at 184 tokens in addition to it)",
    ),
}


def published_data(file_name: str) -> PublishedData | None:
    """The data set that is published under this file name; None for any other."""
    return _DATA.get(file_name)


# Records that are tokenized to know the lengths of all.
PROBED = 256
# Words in addition to an image where nothing is known: what LLaVA's own data of a stage has.
_ASSUMED = {"align": "blip_laion_cc_sbu_558k.json", "finetune": "llava_v1_5_mix665k.json"}


@dataclass(frozen=True)
class Samples:
    """A run's samples, as a plan needs them.

    Attributes:
        count: in an epoch; None: not known.
        lengths: tokens of some samples, images included, that stand for all.
        image_counts: likewise, images; with anyres, as everywhere below, tiles.
        supervised: positions that are learned from, per sample.
        images: per sample, on average.
        longest: tokens of the longest sample that is to be expected, with `most_images` images.
        source: where this comes from, in words.
        tiles: whether images are tiles.
    """

    count: int | None
    lengths: tuple[int, ...]
    image_counts: tuple[int, ...]
    supervised: float
    images: float
    longest: int
    most_images: int
    source: str
    tiles: bool = False

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    @property
    def mean_pairs(self) -> float:
        """Of a query and a key that it sees, per sample."""
        return sum(length * (length + 1) / 2 for length in self.lengths) / len(self.lengths)

    def padded_length(self, rows: int) -> float:
        """The expected length of the longest of `rows` samples drawn at random."""
        ordered, total, below = sorted(self.lengths), 0.0, 0.0
        for number, length in enumerate(ordered, start=1):
            upto = (number / len(ordered)) ** rows
            total, below = total + length * (upto - below), upto
        return total


def expected_samples(run: ResolvedRun) -> Samples:
    """The samples of a run: its own if data and tokenizer are here, those of a published data set, or an assumption."""
    config, model = run.config, run.model
    known = published_data(Path(sources(config.data)[0].path).name)
    if run.has_data:
        records = run.data.training
        if run.tokenizer is not None:
            return probe_samples(records, run.tokenizer, config, model)
        described = known or published_data(_ASSUMED[config.stage])
        assert described is not None
        return replace(_described(described, config, model), count=len(records))
    if known is not None:
        return _described(known, config, model)
    assumed = published_data(_ASSUMED[config.stage])
    assert assumed is not None
    return replace(
        _described(assumed, config, model),
        count=None,
        longest=config.data.max_length,
        source=f"assumed to be as long as {assumed.source}; {sources(config.data)[0].path} is not on this machine",
    )


def probe_samples(records: Sequence[Record], tokenizer: Any, config: RunConfig, model: LlavaNpuConfig) -> Samples:
    """Tokenizes some of the records, spread over all, as training will; decodes no image."""
    template = config.data.template or STAGE_TEMPLATES[config.stage]
    template = template or ("tokenizer" if getattr(tokenizer, "chat_template", None) else "v1")
    choices = image_token_choices(config.data, model)
    count = min(len(records), PROBED)
    lengths, supervised, images = [], 0, []
    for number in range(count):
        try:
            record = records[number * len(records) // count]
            encoded = encode_conversation(record.conversations, tokenizer, template, record=record)
            sizes = [_size(path, record, model) for path in record.image_paths]
            if choices is None:
                per_image = [model.count_image_tokens(size) for size in sizes]
            else:
                per_image = [ImageTokens(choices, config.seed).drawn(0, number * len(records) // count)] * len(sizes)
            expanded = expand_images(encoded, per_image, model.image_token_index, config.data.max_length, record)
        except UserError:
            continue  # training reports what is wrong with it, or skips it
        lengths.append(len(expanded.input_ids))
        supervised += sum(label != IGNORE_INDEX for label in expanded.labels)
        images.append(sum(_num_tiles(model, size) for size in sizes[: expanded.num_images]))
    if not lengths:
        raise UserError(f"data: none of {count} records can be used; run `llava-npu data check` to see why.")
    return Samples(
        len(records),
        tuple(lengths),
        tuple(images),
        supervised / len(lengths),
        sum(images) / len(lengths),
        max(lengths),
        max(images),
        f"measured on {len(lengths)} of {len(records):,} records",
        tiles=model.tiling is not None,
    )


def _described(data: PublishedData, config: RunConfig, model: LlavaNpuConfig) -> Samples:
    tokens, tiles = model.count_image_tokens(TYPICAL), _num_tiles(model, TYPICAL)
    length = min(round(data.words + data.images * tokens), config.data.max_length)
    longest = config.data.max_length
    if data.longest is not None:
        longest = min(longest, data.longest + tokens)
    source = data.source
    if model.tiling is not None:
        source += f"; images assumed to have {TYPICAL[1]}×{TYPICAL[0]} pixels: {tiles} tiles, {tokens:,} tokens"
    images, cut = tiles * data.images, model.tiling is not None
    return Samples(data.samples, (length,), (tiles,), data.supervised, images, longest, tiles, source, cut)


def _size(path: ImagePath, record: Record, model: LlavaNpuConfig) -> Size:
    """(height, width) of a image, from its file's head, where it matters."""
    return TYPICAL if model.tiling is None else image_size(path, record.name)


def _num_tiles(model: LlavaNpuConfig, size: Size) -> int:
    return 1 if model.tiling is None else model.tiling.num_tiles(size)
