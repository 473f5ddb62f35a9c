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
from torch.nn import functional
from transformers import DynamicCache

from llava_npu.data.image_sources import ImageSource
from llava_npu.inference.features import ImageFeatures, image_inputs, tokens_at_once
from llava_npu.models.loaded import LoadedModel


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


def beginning_lengths(model: Any, prompts: Sequence[Prompt], image_token_id: int) -> list[int] | None:
    """How many tokens of each prompt to compute before generation, which goes on from there.

    What prompts share; or, where they share nothing and are too much for one pass (see `tokens_at_once`), all but each
    prompt's last token. None where generation may as well read the prompts itself.
    """
    if not can_share(model):
        return None
    shared = shared_lengths(prompts, image_token_id)
    if shared is not None:
        return shared
    most = [len(prompt.ids) - 1 for prompt in prompts]
    least = [max(1, _end_of_images(prompt, image_token_id)) for prompt in prompts]
    fits = len(_portions(most, tokens_at_once(model.device))) == 1
    return None if fits or any(a < b for a, b in zip(most, least, strict=True)) else most


def begin(
    loaded: LoadedModel, prompts: Sequence[Prompt], lengths: Sequence[int], features: Mapping[str, ImageFeatures]
) -> Begun:
    """Runs the distinct beginnings of a batch of prompts, in as few passes as the device is served well with.

    Args:
        loaded: the model, as `llava_npu.load` returns it.
        prompts: the batch.
        lengths: of their beginnings (see `shared_lengths`).
        features: of every image, by key.
    """
    model, processor = loaded
    beginnings = [Prompt(prompt.ids[:length], prompt.images) for prompt, length in zip(prompts, lengths, strict=True)]
    rows = {beginning: row for row, beginning in enumerate(dict.fromkeys(beginnings))}
    batch = processor.pad_left([beginning.ids for beginning in rows])
    mask = batch["attention_mask"]  # (beginnings, longest)
    portions = _portions([len(beginning.ids) for beginning in rows], tokens_at_once(model.device))
    runs = [
        _run(model, batch["input_ids"][portion], mask[portion], list(rows)[portion], features) for portion in portions
    ]
    cache = _joined([cache for cache, _ in runs], model)
    last = torch.cat([each for _, each in runs])
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
        last=last.index_select(0, on_device),
    )


def _portions(lengths: Sequence[int], most: int | None) -> list[slice]:
    """Rows that go through the model together: of at most so many tokens, padding included, and one row at least."""
    starts = [0]
    for row in range(1, len(lengths)):
        together = lengths[starts[-1] : row + 1]
        if most is not None and len(together) * max(together) > most:
            starts.append(row)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _run(
    model: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    prompts: Sequence[Prompt],
    features: Mapping[str, ImageFeatures],
) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of some rows, without columns of nothing but padding; their last hidden states, (rows, 1, C)."""
    width = int(mask.sum(1).max())
    mask = mask[:, -width:]
    cache = DynamicCache(config=model.config.get_text_config())
    hidden = model.model(
        input_ids=input_ids[:, -width:].to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        **image_inputs([prompt.images for prompt in prompts], features, model.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return cache, hidden[:, -1:]


def _joined(caches: Sequence[DynamicCache], model: Any) -> DynamicCache:
    """One cache of all rows, padded on the left to the longest."""
    if len(caches) == 1:
        return caches[0]
    longest = max(cache.get_seq_length() for cache in caches)
    joined = DynamicCache(config=model.config.get_text_config())
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = (
            torch.cat([functional.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])
            for parts in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
        )  # (rows, heads, longest, head_dim) each
        joined.update(keys, values, number)
    return joined


def _end_of_images(prompt: Prompt, image_token_id: int) -> int:
    """Behind which token the last image ends; 0 without images."""
    return max((place + 1 for place, token in enumerate(prompt.ids) if token == image_token_id), default=0)


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """With how many equal tokens all sequences begin."""
    shortest = min(map(len, sequences))
    columns = enumerate(zip(*sequences, strict=False))  # as far as the shortest goes
    return next((place for place, column in columns if len(set(column)) > 1), shortest)
