"""From the scores of the next token to the token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_npu.inference.request import Sampling


class TokenChooser:
    """Chooses one answer's tokens. Draws are made on the host: the same seed gives the same answer on every device."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._processors = _processors(sampling)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the raw scores' maximum is the choice."""
        return self._sampling.is_greedy and not self._processors

    def choose(self, scores: torch.Tensor, so_far: Sequence[int]) -> int:
        """
        Args:
            scores: (vocabulary,), float32 on the host.
            so_far: the tokens of prompt and answer.
        """
        processed = self._processors(torch.tensor([list(so_far)]), scores[None])
        if self._sampling.is_greedy:
            return int(processed.argmax())
        return int(torch.multinomial(processed.softmax(-1), 1, generator=self._generator))


def choose_tokens(logits: torch.Tensor, choosers: Sequence[TokenChooser], so_far: Sequence[Sequence[int]]) -> list[int]:
    """The next token of each answer; on an accelerator the one wait of a step.

    Args:
        logits: (answers, vocabulary).
        so_far: each one's tokens, prompt and answer.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.takes_the_likeliest]
    if drawn:
        scores = logits[torch.tensor(drawn, device=logits.device)].float().cpu()
        for of_one, row in zip(scores, drawn, strict=True):
            tokens[row] = choosers[row].choose(of_one, so_far[row])
    return tokens


def _processors(sampling: Sampling) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if not sampling.is_greedy:
        processors.append(TemperatureLogitsWarper(max(sampling.temperature, 1e-4)))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors
