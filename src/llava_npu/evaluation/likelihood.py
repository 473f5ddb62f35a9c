"""How likely a model finds given answers: one padded forward, logits at the answers' tokens only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llava_npu.data.labels import IGNORE_INDEX, ExpandedConversation, encode_conversation, expand_images
from llava_npu.errors import UserError
from llava_npu.evaluation.features import stack_features
from llava_npu.evaluation.images import ImageSource


@dataclass(frozen=True)
class LogProbability:
    """Of one answer: its tokens' log-probabilities summed, and their number (the end token included)."""

    total: float
    num_tokens: int

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
    model: Any,
    processor: Any,
    items: Sequence[AnsweredPrompt],
    features: Mapping[str, torch.Tensor],
) -> list[LogProbability]:
    """Scores the supervised tokens of each conversation, exactly those that training would supervise.

    Args:
        model, processor: as `llava_npu.models.load` gives them.
        items: conversations with their answers.
        features: image key → (tokens, channels), of every image in `items`.
    """
    encoded = [_encode(processor, item) for item in items]
    longest = max(len(each.input_ids) for each in encoded)
    pad = processor.tokenizer.pad_token_id
    # Padded on the right: every token keeps the position it has in training.
    input_ids = torch.tensor([each.input_ids + [pad] * (longest - len(each.input_ids)) for each in encoded])
    attention_mask = torch.tensor(
        [[1] * len(each.input_ids) + [0] * (longest - len(each.input_ids)) for each in encoded]
    )
    # The position before a supervised token predicts it. Found on the host: the device need not be waited for.
    places = [
        (number, position - 1, label)
        for number, each in enumerate(encoded)
        for position, label in enumerate(each.labels)
        if label != IGNORE_INDEX and position > 0
    ]
    sequence, position, target = torch.tensor(places, device=model.device).unbind(1)  # (supervised tokens,) each

    hidden = model.model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        vision_features=stack_features([item.images for item in items], dict(features), model.device),
        use_cache=False,
    ).last_hidden_state  # (items, length, hidden size)
    logits = model.lm_head(hidden[sequence, position]).float()  # (supervised tokens, vocabulary)
    log_probabilities = -F.cross_entropy(logits, target, reduction="none")
    totals = torch.zeros(len(items), device=model.device).index_add(0, sequence, log_probabilities).tolist()
    counts = Counter(number for number, _, _ in places)
    for item, total in zip(items, totals, strict=True):
        if not math.isfinite(total):
            raise UserError(f"{item.name}: log-probability {total}. Are the model's weights finite, its dtype fit?")
    return [LogProbability(total, counts[number]) for number, total in enumerate(totals)]


def _encode(processor: Any, item: AnsweredPrompt) -> ExpandedConversation:
    encoded = encode_conversation(item.conversations, processor.tokenizer, processor.template, record=item.name)
    widths = [processor.num_image_tokens] * len(item.images)
    return expand_images(encoded, widths, processor.image_token_id, record=item.name)
