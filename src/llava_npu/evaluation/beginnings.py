"""What several prompts begin with, computed once: one image and system text for all questions and rotations about it.

Prompts about the same images begin alike, up to the question or, for the rotations of one question, up to the options.
Keys and values of each distinct beginning are computed once and copied to all prompts that go on from it. A batch then
looks so, its columns read from the left (· is padding):

    · · b e g i n n i n g | · · r e s t
    b e g i n n i n g , 2 | · o t h e r

Every prompt ends in the last column, where its answer starts, as with plain padding on the left. Padding is masked and
has no position, so that each token sees exactly what it sees in its prompt alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from llava_npu.evaluation.features import ImageFeatures, image_inputs
from llava_npu.evaluation.images import ImageSource


@dataclass(frozen=True)
class Prompt:
    """Token ids, every image expanded to its tokens, and the images in the order of the text."""

    ids: tuple[int, ...]
    images: tuple[ImageSource, ...]


@dataclass(frozen=True)
class Begun:
    """A batch of prompts whose beginnings are computed.

    Attributes:
        input_ids, attention_mask: (prompts, length) on the host, beginnings and rests, each padded on the left.
        computed: how many of the columns are in `cache`.
        cache: keys and values of those columns, a row for each prompt.
        last: (prompts, 1, hidden size), the last hidden state of each beginning.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    computed: int
    cache: DynamicCache
    last: torch.Tensor

    @property
    def position_ids(self) -> torch.Tensor:
        """(prompts, length) on the host."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)


def can_share(model: Any) -> bool:
    """Whether all layers attend to everything before: with a sliding window, padding between would count."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    return not kinds and getattr(text, "sliding_window", None) is None


def shared_lengths(prompts: Sequence[Prompt], image_token_id: int) -> list[int] | None:
    """How many tokens of each prompt form its beginning: those that all prompts about the same images have in common.

    A beginning holds all images of its prompt, and leaves at least one token as its rest. A prompt that has nothing in
    common with any other has as much of it in its beginning as makes the rests of the batch equally long.

    Args:
        prompts: the batch.
        image_token_id: the token that stands for a piece of an image.

    Returns:
        lengths in tokens, or None if no two prompts have anything in common (or one is too short to be cut).
    """
    companies: dict[tuple[ImageSource, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        companies[prompt.images].append(number)
    least = [max(1, _end_of_images(prompt, image_token_id)) for prompt in prompts]
    lengths: dict[int, int] = {}
    for members in companies.values():
        ids = [prompts[number].ids for number in members]
        common = min(_common_length(ids), min(map(len, ids)) - 1)
        if len(members) > 1 and common >= max(least[number] for number in members):
            lengths.update(dict.fromkeys(members, common))
    if not lengths or any(len(prompt.ids) == length for prompt, length in zip(prompts, least, strict=True)):
        return None  # nothing to share, or a prompt that would leave no rest
    longest_rest = max(len(prompts[number].ids) - length for number, length in lengths.items())
    return [
        lengths.get(number, max(len(prompt.ids) - longest_rest, least[number])) for number, prompt in enumerate(prompts)
    ]


def begin(
    model: Any, processor: Any, prompts: Sequence[Prompt], lengths: Sequence[int], features: Mapping[str, ImageFeatures]
) -> Begun:
    """Runs the distinct beginnings of a batch of prompts, in one forward pass.

    Args:
        model, processor: as `llava_npu.models.load` gives them.
        prompts: the batch.
        lengths: of their beginnings (see `shared_lengths`).
        features: of every image, by key.
    """
    beginnings = [Prompt(prompt.ids[:length], prompt.images) for prompt, length in zip(prompts, lengths, strict=True)]
    rows = {beginning: row for row, beginning in enumerate(dict.fromkeys(beginnings))}
    batch = processor.pad_left([beginning.ids for beginning in rows])
    mask = batch["attention_mask"]  # (beginnings, longest)
    cache = DynamicCache(config=model.config.get_text_config())
    hidden = model.model(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        **image_inputs([beginning.images for beginning in rows], features, model.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    chosen = [rows[beginning] for beginning in beginnings]
    on_device = torch.tensor(chosen, device=model.device)
    if chosen != list(range(len(rows))):
        cache.batch_select_indices(on_device)
    rests = processor.pad_left([prompt.ids[length:] for prompt, length in zip(prompts, lengths, strict=True)])
    return Begun(
        input_ids=torch.cat([batch["input_ids"][chosen], rests["input_ids"].long()], dim=1),
        attention_mask=torch.cat([mask[chosen], rests["attention_mask"].long()], dim=1),
        computed=mask.shape[1],
        cache=cache,
        last=hidden[:, -1:].index_select(0, on_device),
    )


def _end_of_images(prompt: Prompt, image_token_id: int) -> int:
    """Behind which token the last image ends; 0 without images."""
    return max((place + 1 for place, token in enumerate(prompt.ids) if token == image_token_id), default=0)


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """With how many equal tokens all sequences begin."""
    shortest = min(map(len, sequences))
    columns = enumerate(zip(*sequences, strict=False))
    return next((place for place, column in columns if len(set(column)) > 1), shortest)
