"""From a record's index to what the model takes, and from several to a padded batch or a pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava_npu.data.conversation.labels import IGNORE_INDEX, ExpandedConversation, encode_conversation, expand_images
from llava_npu.data.formats.parsing import Record
from llava_npu.data.image_roots import ImagePath
from llava_npu.data.images import image_size, load_image
from llava_npu.errors import UserError

# What a run does about a sample that it cannot use: stop (`error`), or take another one and say so (`skip`). The
# substitute depends on nothing but the bad sample's number, so that a run repeats, resumes and divides over devices as
# without bad samples. Text alone may stand in for an image and the other way round.
BadSamples = Literal["error", "skip"]
MAX_SUBSTITUTES = 16

ImageSize = tuple[int, int]  # (height, width) in pixels


class Processor(Protocol):
    """What a data set needs of `LlavaNpuProcessor`."""

    tokenizer: Any
    template: str
    image_token_id: int
    num_image_tokens: int
    tiling: Any  # what, besides its size, decides how many tokens an image has; None: all have `num_image_tokens`

    def count_image_tokens(self, size: ImageSize) -> int: ...

    def preprocess_images(self, images: list[Image.Image]) -> Tensor: ...


class Features(Protocol):
    """From an image's path to its vision features (tiles, tokens, channels): a cache on disk, or a dict."""

    def __getitem__(self, image: Any, /) -> Tensor: ...

    def __contains__(self, image: Any, /) -> bool: ...


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for the model.

    Args:
        input_ids: shape (length,).
        labels: shape (length,), `IGNORE_INDEX` where nothing is learned.
        pixel_values: shape (tiles of all images, 3, height, width), where an image is one tile unless the model cuts it
            (anyres); None without images, or with cached features.
        vision_features: shape (tiles of all images, tokens, channels), from a feature cache instead of pixels.
        name: the record, for messages.
        replaced: what was wrong with the sample that this one stands in for; None: it is itself.
        image_sizes: each image's (height, width), where the model needs them (anyres).
        tokens_per_image: how many tokens each image has, where it varies (`ConversationDataset.image_tokens`).
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    vision_features: Tensor | None
    name: str
    replaced: str | None = None
    image_sizes: tuple[ImageSize, ...] | None = None
    tokens_per_image: tuple[int, ...] | None = None


def load_or_substitute(load: Callable[[int], Sample], index: int, num_samples: int) -> Sample:
    """The sample, or the first good one among those drawn in its place; that one's `replaced` says what was wrong.

    Raises:
        UserError: the sample is bad and so are all that were drawn: the fault is not the samples'.
    """
    try:
        return load(index)
    except UserError as error:
        problem = error
    for substitute in substitutes(index, num_samples):
        try:
            sample = load(substitute)
        except UserError:
            continue  # named when it is its own turn
        return replace(sample, replaced=f"{problem} (replaced by {sample.name})")
    raise UserError(
        f"{problem}\nNone of the {MAX_SUBSTITUTES} samples drawn in its place can be used either, so data.bad_samples: "
        "skip does not help. Check the data file and data.image_root with `llava-npu data check`."
    ) from problem


def substitutes(index: int, num_samples: int) -> list[int]:
    """The samples to try in place of sample `index`, in order: a pseudo-random draw that only these numbers decide."""
    draws = np.random.PCG64(np.random.SeedSequence([index, num_samples])).random_raw(MAX_SUBSTITUTES)
    return [int(draw) for draw in draws % num_samples]


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens each sample's images have: a draw that seed, epoch and sample alone decide.

    So lengths are known before a run is packed, in every process, and the same after a resumption.

    Args:
        choices: numbers of tokens that the model can give an image.
        seed: of the run.
        epochs: `Plan.num_epochs`.
    """

    choices: Sequence[int]
    seed: int = 0
    epochs: int = 1

    def drawn(self, epoch: int, sample: int) -> int:
        """One of `choices`, each as likely, for all images of a sample in an epoch."""
        draw = np.random.SeedSequence([self.seed, epoch, sample]).generate_state(1)[0]
        return self.choices[int(draw) % len(self.choices)]


class ConversationDataset(Dataset[Sample]):
    """Records as training samples; each is read and encoded when asked for.

    Args:
        records: from `load_records`, or `open_records` where not all of them should be in memory.
        processor: its tokenizer, template and image preprocessing are used.
        template: another template than the processor's (stage 1 trains captions with 'plain').
        max_length: the most tokens of a sample, images included; images that do not fit go with the text cut off.
        features: the frozen vision tower's output for each image. Given these, no image is opened.
        bad_samples: 'error' raises for a sample that cannot be used; 'skip' gives another in its place.
        image_tokens: draws how many tokens each sample's images have. The data set then has the samples of all epochs,
            one epoch after the other (`Plan.counts_epochs`). None: as many as the processor says, in every epoch.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor,
        template: str | None = None,
        max_length: int | None = None,
        features: Features | None = None,
        bad_samples: BadSamples = "error",
        image_tokens: ImageTokens | None = None,
    ) -> None:
        self.records = records
        self.processor = processor
        self.template = template or processor.template
        self.max_length = max_length
        self.features = features
        self.bad_samples = bad_samples
        self.image_tokens = image_tokens

    def __len__(self) -> int:
        return len(self.records) * (1 if self.image_tokens is None else self.image_tokens.epochs)

    def __getitem__(self, index: int) -> Sample:
        return self.load(index)

    def load(self, index: int, room: int | None = None) -> Sample:
        """A sample, or with `bad_samples` 'skip' what stands in for it, which is cut to `room` tokens.

        Args:
            room: the sample's own length, as it was counted (`token_counts`).

        Raises:
            UserError: the sample cannot be used, or is longer than it was counted.
        """

        def load(number: int) -> Sample:
            return self._load(number, room if number != index else None)

        sample = load_or_substitute(load, index, len(self.records)) if self.bad_samples == "skip" else load(index)
        if room is not None and len(sample.input_ids) > room:
            raise UserError(
                f"{sample.name}: {len(sample.input_ids)} tokens, but {room} when the run was planned: its images or "
                "the tokenizer have changed since. Delete the folder token-counts in the cache and start again"
            )
        return sample

    def encode(self, index: int, room: int | None = None) -> tuple[Record, ExpandedConversation]:
        """A record and its text, cut to `max_length` and `room`; no image is decoded.

        Raises:
            UserError: the record cannot be used.
        """
        record, expanded, _ = self._encode(index, room)
        return record, expanded

    def _encode(self, index: int, room: int | None) -> tuple[Record, ExpandedConversation, list[ImageSize]]:
        record, processor = self.records[index % len(self.records)], self.processor
        encoded = encode_conversation(record.conversations, processor.tokenizer, self.template, record=record)
        sizes = self._image_sizes(record)
        if self.image_tokens is None:
            tokens_per_image = [processor.count_image_tokens(size) for size in sizes]
        else:
            tokens_per_image = [self._drawn(index)] * len(sizes)
        limits = [limit for limit in (self.max_length, room) if limit is not None]
        limit = min(limits, default=None)
        return record, expand_images(encoded, tokens_per_image, processor.image_token_id, limit, record), sizes

    def _load(self, index: int, room: int | None) -> Sample:
        record, expanded, sizes = self._encode(index, room)
        processor = self.processor
        paths = record.image_paths[: expanded.num_images]
        pixel_values = vision_features = None
        if paths and self.features is None:
            pixel_values = processor.preprocess_images([load_image(path, record.name) for path in paths])
        elif paths and self.features is not None:
            vision_features = torch.cat([_look_up(self.features, path, record) for path in paths])
        return Sample(
            torch.tensor(expanded.input_ids),
            torch.tensor(expanded.labels),
            pixel_values,
            vision_features,
            record.name,
            image_sizes=tuple(sizes[: len(paths)]) if paths and processor.tiling is not None else None,
            tokens_per_image=(self._drawn(index),) * len(paths) if self.image_tokens else None,
        )

    def _drawn(self, index: int) -> int:
        assert self.image_tokens is not None
        return self.image_tokens.drawn(*divmod(index, len(self.records)))

    def _image_sizes(self, record: Record) -> list[ImageSize]:
        """(height, width) of each image; read from the files only where the number of tokens depends on it."""
        if self.processor.tiling is None:
            return [(0, 0)] * len(record.images)
        return [image_size(path, record.name) for path in record.image_paths]


def collate(samples: Sequence[Sample], pad_token_id: int, length: int | None = None) -> dict[str, Tensor]:
    """Right-pads samples to the model's keyword arguments.

    Args:
        length: of the rows; None: that of the longest sample.

    Returns:
        input_ids, attention_mask, labels: (batch, length). Which positions are padding is in the mask alone: a
        pad id within a text stays a token like others.
        pixel_values or vision_features: all images of the batch in order, first axis; absent where there are none.
        image_sizes: (images, 2), their heights and widths, where the model needs them.
    """
    length = length or max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_token_id, dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros((len(samples), length), dtype=torch.long)
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        input_ids[row, :end] = sample.input_ids
        labels[row, :end] = sample.labels
        attention_mask[row, :end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **_images(samples)}


def pack(samples: Sequence[Sample], length: int, pad_token_id: int) -> dict[str, Tensor]:
    """Lays samples end to end in one row of `length` tokens, padded at the end.

    Returns:
        input_ids, attention_mask, labels: (1, length), as from `collate`. The first token of each sample has no label:
        nothing before it may predict it.
        pixel_values or vision_features, and image_sizes: as from `collate`.
    """
    used = sum(len(sample.input_ids) for sample in samples)
    if used > length:
        raise ValueError(f"{used} tokens do not fit into a pack of {length}")
    labels = [sample.labels.clone() for sample in samples]
    for of_sample in labels:
        of_sample[0] = IGNORE_INDEX
    padding = torch.full((length - used,), pad_token_id)
    return {
        "input_ids": torch.cat([*(sample.input_ids for sample in samples), padding])[None],
        "attention_mask": (torch.arange(length) < used).long()[None],
        "labels": torch.cat([*labels, torch.full_like(padding, IGNORE_INDEX)])[None],
        **_images(samples),
    }


def _images(samples: Sequence[Sample]) -> dict[str, Tensor]:
    images = {
        "pixel_values": [sample.pixel_values for sample in samples if sample.pixel_values is not None],
        "vision_features": [sample.vision_features for sample in samples if sample.vision_features is not None],
    }
    batch = {name: torch.cat(tensors) for name, tensors in images.items() if tensors}
    if sizes := [size for sample in samples for size in sample.image_sizes or ()]:
        batch["image_sizes"] = torch.tensor(sizes)
    return batch


def _look_up(features: Features, image: ImagePath, record: Record) -> Tensor:
    try:
        if image in features:
            return features[image]
    except OSError as error:
        raise UserError(f"{record.name}: image {image}: cannot be read: {error.strerror or error}") from error
    except UserError as error:  # what names the image is given the record's name, too
        raise UserError(f"{record.name}: image {error}") from error
    raise UserError(f"{record.name}: image {image} is not in the feature cache; compute the cache again")
