"""From a record's index to what the model takes, and from several to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava_npu.data.bad_samples import BadSamples, load_or_substitute
from llava_npu.data.image_roots import ImagePath
from llava_npu.data.images import load_image
from llava_npu.data.labels import IGNORE_INDEX, encode_conversation, expand_images
from llava_npu.data.parsing import Record
from llava_npu.errors import UserError


class Processor(Protocol):
    """What a data set needs of `LlavaNpuProcessor`."""

    tokenizer: Any
    template: str
    num_image_tokens: int
    image_token_id: int

    def preprocess_images(self, images: list[Image.Image]) -> Tensor: ...


class Features(Protocol):
    """From an image's path to its vision features (tokens, channels): a cache on disk, or a dict."""

    def __getitem__(self, image: Any, /) -> Tensor: ...

    def __contains__(self, image: Any, /) -> bool: ...


@dataclass(frozen=True)
class Sample:
    """One conversation, ready for the model.

    Args:
        input_ids: shape (length,).
        labels: shape (length,), `IGNORE_INDEX` where nothing is learned.
        pixel_values: shape (num_images, 3, height, width); None without images, or with cached features.
        vision_features: shape (num_images, tokens, channels), from a feature cache instead of pixels.
        name: the record, for messages.
        replaced: what was wrong with the sample that this one stands in for (`bad_samples.py`); None: it is itself.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    vision_features: Tensor | None
    name: str
    replaced: str | None = None


class ConversationDataset(Dataset[Sample]):
    """Records as training samples; each is read and encoded when asked for.

    Args:
        records: from `load_records`, or `open_records` where not all of them should be in memory.
        processor: its tokenizer, template and image preprocessing are used.
        template: another template than the processor's (stage 1 trains captions with 'plain').
        max_length: the most tokens of a sample, images included; images that do not fit go with the text cut off.
        features: the frozen vision tower's output for each image. Given these, no picture is opened.
        bad_samples: 'error' raises for a sample that cannot be used; 'skip' gives another in its place.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor,
        template: str | None = None,
        max_length: int | None = None,
        features: Features | None = None,
        bad_samples: BadSamples = "error",
    ) -> None:
        self.records = records
        self.processor = processor
        self.template = template or processor.template
        self.max_length = max_length
        self.features = features
        self.bad_samples = bad_samples

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if self.bad_samples == "skip":
            return load_or_substitute(self._load, index, len(self))
        return self._load(index)

    def _load(self, index: int) -> Sample:
        record, processor = self.records[index], self.processor
        encoded = encode_conversation(record.conversations, processor.tokenizer, self.template, record=record)
        tokens_per_image = [processor.num_image_tokens] * len(record.images)
        expanded = expand_images(encoded, tokens_per_image, processor.image_token_id, self.max_length, record)
        paths = record.image_paths[: expanded.num_images]
        pixel_values = vision_features = None
        if paths and self.features is None:
            pixel_values = processor.preprocess_images([load_image(path, record.name) for path in paths])
        elif paths and self.features is not None:
            vision_features = torch.stack([_look_up(self.features, path, record) for path in paths])
        return Sample(
            torch.tensor(expanded.input_ids), torch.tensor(expanded.labels), pixel_values, vision_features, record.name
        )


def collate(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Tensor]:
    """Right-pads samples to the model's keyword arguments.

    Returns:
        input_ids, attention_mask, labels: (batch, longest sample). Which positions are padding is in the mask alone: a
        pad id within a text stays a token like others.
        pixel_values or vision_features: all images of the batch in order, first axis; absent where there are none.
    """
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_token_id, dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros((len(samples), length), dtype=torch.long)
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        input_ids[row, :end] = sample.input_ids
        labels[row, :end] = sample.labels
        attention_mask[row, :end] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if pixels := [sample.pixel_values for sample in samples if sample.pixel_values is not None]:
        batch["pixel_values"] = torch.cat(pixels)
    if features := [sample.vision_features for sample in samples if sample.vision_features is not None]:
        batch["vision_features"] = torch.cat(features)
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
