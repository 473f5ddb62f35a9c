"""A record as it is inspected: what becomes of it in training, or why it cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_npu.data.conversation.labels import IGNORE_INDEX, EncodedConversation, encode_conversation
from llava_npu.data.conversation.templates import Template
from llava_npu.data.formats.parsing import Record
from llava_npu.data.image_roots import ImagePath, exists
from llava_npu.data.images import load_image
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class InspectedSample:
    """A record and what becomes of it; without a record or its encoding, `problems` says why.

    Args:
        title: the record's name, or its number where it could not be read.
        problems: why it cannot be trained on, its missing and damaged images among them; empty if it can.
    """

    title: str
    record: Record | None
    encoded: EncodedConversation | None
    problems: tuple[str, ...]


def inspect_sample(
    records: Sequence[Record], number: int, tokenizer: PreTrainedTokenizerBase, template: Template
) -> InspectedSample:
    """Reads and encodes a record, as training does, but keeps its errors."""
    try:
        record = records[number]
    except UserError as error:
        return InspectedSample(f"record {number}", None, None, (str(error),))
    problems = []
    encoded = None
    try:
        encoded = encode_conversation(record.conversations, tokenizer, template, record=record)
    except UserError as error:
        problems.append(str(error))
    try:
        problems += [problem for path in record.image_paths if (problem := _image_problem(path))]
    except UserError as error:
        problems.append(str(error))
    return InspectedSample(record.name, record, encoded, tuple(problems))


def _image_problem(path: ImagePath) -> str:
    """Why an image cannot be used; "" if it can."""
    if not exists(path):
        return f"missing image: {path}"
    try:
        load_image(path)
    except UserError as error:
        return str(error).removeprefix("image: ")
    return ""


def headline(sample: InspectedSample) -> str:
    """How long it is, how much of it is learned, and its images."""
    if sample.record is None or sample.encoded is None:
        return ""
    num_supervised = sum(label != IGNORE_INDEX for label in sample.encoded.labels)
    names = ", ".join(map(str, sample.record.images))
    images = f", images: {names}" if names else ", text only"
    return f"{len(sample.encoded.input_ids)} tokens, {num_supervised} supervised{images}"
