"""How likely a model finds given answers: shared prompts computed once, logits at the answers' tokens only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from llava_npu.data.conversation.labels import IGNORE_INDEX, encode_conversation, expand_images
from llava_npu.data.image_sources import ImageSource
from llava_npu.errors import UserError
from llava_npu.inference.features import ImageFeatures
from llava_npu.inference.prefix_cache import Prompt, begin, can_share, shared_lengths
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.processing import LlavaNpuProcessor


@dataclass(frozen=True)
class LogProbability:
    """Of one answer.

    Attributes:
        total: its tokens' log-probabilities, summed.
        num_tokens: how many they are.
        is_greedy: whether each of them is the likeliest in its place.
    """

    total: float
    num_tokens: int
    is_greedy: bool

    @property
    def mean(self) -> float:
        return self.total / self.num_tokens


@dataclass(frozen=True)
class AnsweredPrompt:
    """A conversation that ends with the answer to be scored, its images, and a name for error messages."""

    conversations: Sequence[Any]
    images: tuple[ImageSource, ...]
    name: str


@torch.no_grad()
def answer_log_probabilities(
    loaded: LoadedModel,
    items: Sequence[AnsweredPrompt],
    features: Mapping[str, ImageFeatures],
    *,
    ends: bool = True,
) -> list[LogProbability]:
    """Scores the supervised tokens of each conversation, exactly those that training would supervise.

    What several conversations have in common before their answers, image and question, is computed once: its keys and
    values are kept and shared, so that four options cost little more than one. So is what questions about one picture
    have in common.

    Args:
        loaded: the model, as `llava_npu.load` returns it.
        items: conversations with their answers.
        features: of every image in `items`, by key.
        ends: whether what all answers end with alike, the end token, is scored. Without it answers of one token, as an
            option's letter, are scored behind their question, in one pass.
    """
    model, processor = loaded
    scored = [_encode(processor, item, features) for item in items]
    if not ends:
        scored = _without_end(scored)
    questions = [Prompt(each.prefix, item.images) for each, item in zip(scored, items, strict=True)]
    rows = {question: row for row, question in enumerate(dict.fromkeys(questions))}
    mask, last, cache = _run_questions(loaded, list(rows), features)
    shared = [rows[question] for question in questions]
    hidden = last[torch.tensor(shared, device=model.device)]  # (items, 1, hidden size)
    longest = max(len(each.answer) for each in scored) - 1
    if longest:
        cache.batch_select_indices(torch.tensor(shared, device=model.device))
        behind = _run_answers(loaded, scored, longest, mask[shared], cache)
        hidden = torch.cat([hidden, behind], dim=1)  # (items, longest answer, hidden size)

    # Position j predicts the answer's token j. Found on the host: the device need not be waited for.
    places = [
        (number, place, label)
        for number, each in enumerate(scored)
        for place, label in enumerate(each.labels)
        if label != IGNORE_INDEX
    ]
    sequence, place, target = torch.tensor(places, device=model.device).unbind(1)  # (supervised tokens,) each
    logits = model.lm_head(hidden[sequence, place]).float()  # (supervised tokens, vocabulary)
    log_probabilities = -F.cross_entropy(logits, target, reduction="none")
    totals = torch.zeros(len(items), device=model.device).index_add(0, sequence, log_probabilities).tolist()
    likeliest = (logits.argmax(-1) == target).tolist()
    beaten = {number for (number, _, _), is_likeliest in zip(places, likeliest, strict=True) if not is_likeliest}
    counts = Counter(number for number, _, _ in places)
    for item, total in zip(items, totals, strict=True):
        if not math.isfinite(total):
            raise UserError(f"{item.name}: log-probability {total}. Are the model's weights finite, its dtype fit?")
    return [LogProbability(total, counts[number], number not in beaten) for number, total in enumerate(totals)]


@dataclass(frozen=True)
class _Scored:
    """A conversation cut where its answer begins: token ids before it, from there on, and the latter's labels."""

    prefix: tuple[int, ...]
    answer: tuple[int, ...]
    labels: tuple[int, ...]


def _encode(processor: LlavaNpuProcessor, item: AnsweredPrompt, features: Mapping[str, ImageFeatures]) -> _Scored:
    encoded = encode_conversation(item.conversations, processor.tokenizer, processor.template, record=item.name)
    widths = [processor.count_image_tokens(features[image.key].size) for image in item.images]
    expanded = expand_images(encoded, widths, processor.image_token_id, record=item.name)
    start = next(place for place, label in enumerate(expanded.labels) if label != IGNORE_INDEX)
    ids, labels = expanded.input_ids, expanded.labels
    return _Scored(tuple(ids[:start]), tuple(ids[start:]), tuple(labels[start:]))


def _without_end(scored: Sequence[_Scored]) -> list[_Scored]:
    """Without the tokens that all answers end with; each keeps one at least."""
    longest = min(len(each.answer) for each in scored) - 1
    alike = (len({each.answer[-place] for each in scored}) == 1 for place in range(1, longest + 1))
    end = next((place for place, same in enumerate(alike) if not same), longest)
    return [
        _Scored(each.prefix, each.answer[: len(each.answer) - end], each.labels[: len(each.labels) - end])
        for each in scored
    ]


def _run_questions(
    loaded: LoadedModel, questions: Sequence[Prompt], features: Mapping[str, ImageFeatures]
) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Runs what stands before the answers, padded on the left.

    Returns:
        which tokens are real, (questions, longest), on the host; the last hidden states, (questions, 1, hidden size);
        and the keys and values.
    """
    model, processor = loaded
    shared = shared_lengths(questions, processor.image_token_id) if can_share(model) else None
    begun = begin(loaded, questions, shared or [len(question.ids) for question in questions], features)
    if shared is None:
        return begun.attention_mask, begun.last, begun.cache
    hidden = model.model(
        input_ids=begun.input_ids[:, begun.computed :].to(model.device),
        attention_mask=begun.attention_mask.to(model.device),
        position_ids=begun.position_ids[:, begun.computed :].to(model.device),
        past_key_values=begun.cache,
        use_cache=True,
    ).last_hidden_state
    return begun.attention_mask, hidden[:, -1:], begun.cache


def _run_answers(
    loaded: LoadedModel,
    scored: Sequence[_Scored],
    longest: int,
    prefix_mask: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """Runs the answers behind their prefixes, without their last token: (items, longest, hidden size)."""
    model, processor = loaded
    pad = processor.tokenizer.pad_token_id
    rests = [each.answer[:-1] for each in scored]
    # Padded on the right: every token keeps the position it has in training.
    ids = torch.tensor([[*rest, *[pad] * (longest - len(rest))] for rest in rests])
    mask = torch.tensor([[1] * len(rest) + [0] * (longest - len(rest)) for rest in rests])
    positions = torch.tensor([[len(each.prefix) + place for place in range(longest)] for each in scored])
    return model.model(
        input_ids=ids.to(model.device),
        attention_mask=torch.cat([prefix_mask, mask], dim=1).to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
