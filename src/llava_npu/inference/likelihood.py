"""How likely a model finds given answers: shared prompts computed once, logits at the answers' tokens only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from llava_npu.data.conversation.labels import IGNORE_INDEX, encode_conversation, expand_images
from llava_npu.data.image_sources import ImageSource
from llava_npu.errors import UserError
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.features import ImageFeatures, image_inputs
from llava_npu.inference.prompts import place_images
from llava_npu.inference.request import ImageInput, Prompt
from llava_npu.inference.runner import Prefill
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
    engine: InferenceEngine,
    items: Sequence[AnsweredPrompt],
    features: Mapping[str, ImageFeatures],
    *,
    ends: bool = True,
) -> list[LogProbability]:
    """Scores the supervised tokens of each conversation, exactly those that training would supervise.

    What several conversations have in common before their answers, image and question, is computed once, so that four
    options cost little more than one. So is what questions about one image have in common.

    Args:
        engine: idle; its rows are used.
        items: conversations with their answers.
        features: of every image in `items`, by key.
        ends: whether what all answers end with alike, the end token, is scored. Without it answers of one token, as an
            option's letter, are scored behind their question, in one pass.
    """
    model, processor = engine.loaded
    scored = [_encode(processor, item, features) for item in items]
    if not ends:
        scored = _without_end(scored)
    hidden = _hidden_states(engine, scored)

    # Position j predicts the answer's token j. Found on the host: the device need not be waited for.
    supervised = [[place for place, label in enumerate(each.labels) if label != IGNORE_INDEX] for each in scored]
    states = torch.cat([of_one[places] for of_one, places in zip(hidden, supervised, strict=True)])
    labels = [each.labels[place] for each, places in zip(scored, supervised, strict=True) for place in places]
    owners = [number for number, places in enumerate(supervised) for _ in places]
    target, sequence = torch.tensor([labels, owners], device=model.device)  # (supervised tokens,) each
    logits = model.lm_head(states).float()  # (supervised tokens, vocabulary)
    log_probabilities = -F.cross_entropy(logits, target, reduction="none")
    totals = torch.zeros(len(items), device=model.device).index_add(0, sequence, log_probabilities).tolist()
    likeliest = (logits.argmax(-1) == target).tolist()
    beaten = {number for number, is_likeliest in zip(owners, likeliest, strict=True) if not is_likeliest}
    for item, total in zip(items, totals, strict=True):
        if not math.isfinite(total):
            raise UserError(
                f"{item.name}: log-probability {total}. Check that the model's weights are finite and its dtype fits."
            )
    return [LogProbability(total, len(supervised[number]), number not in beaten) for number, total in enumerate(totals)]


def _hidden_states(engine: InferenceEngine, scored: Sequence[_Scored]) -> list[torch.Tensor]:
    """For each answer the hidden states that predict its tokens, (answer tokens, hidden size)."""
    # The last token predicts nothing; conversations that are equal without it are computed once.
    distinct: dict[tuple[tuple[int, ...], tuple[str, ...]], Prefill] = {}
    for each in scored:
        known = distinct.get(each.identity)
        outputs = max(len(each.answer), known.num_outputs if known else 0)
        distinct[each.identity] = Prefill(0, each.prompt, outputs)
    prefills = list(distinct.values())
    hidden: list[torch.Tensor] = []
    for start in range(0, len(prefills), engine.max_batch):
        chunk = prefills[start : start + engine.max_batch]
        hidden += engine.runner.prefill([replace(each, row=row) for row, each in enumerate(chunk)])
    found = dict(zip(distinct, hidden, strict=True))
    return [found[each.identity][-len(each.answer) :] for each in scored]


@dataclass(frozen=True)
class _Scored:
    """A conversation cut where its answer begins: token ids before it, from there on, and the latter's labels."""

    prefix: tuple[int, ...]
    answer: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[ImageInput, ...]

    @property
    def prompt(self) -> Prompt:
        """All but the last token."""
        return Prompt([*self.prefix, *self.answer[:-1]], self.images)

    @property
    def identity(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return (*self.prefix, *self.answer[:-1]), tuple(image.key for image in self.images)


def _encode(processor: LlavaNpuProcessor, item: AnsweredPrompt, features: Mapping[str, ImageFeatures]) -> _Scored:
    encoded = encode_conversation(item.conversations, processor.tokenizer, processor.template, record=item.name)
    widths = [processor.count_image_tokens(features[image.key].size) for image in item.images]
    expanded = expand_images(encoded, widths, processor.image_token_id, record=item.name)
    start = next(place for place, label in enumerate(expanded.labels) if label != IGNORE_INDEX)
    ids, labels = expanded.input_ids, expanded.labels
    placed = place_images(processor, ids, image_inputs(item.images, features))
    return _Scored(tuple(ids[:start]), tuple(ids[start:]), tuple(labels[start:]), placed.images)


def _without_end(scored: Sequence[_Scored]) -> list[_Scored]:
    """Without the tokens that all answers end with; each keeps one at least."""
    longest = min(len(each.answer) for each in scored) - 1
    alike = (len({each.answer[-place] for each in scored}) == 1 for place in range(1, longest + 1))
    end = next((place for place, same in enumerate(alike) if not same), longest)
    return [
        replace(each, answer=each.answer[: len(each.answer) - end], labels=each.labels[: len(each.labels) - end])
        for each in scored
    ]
