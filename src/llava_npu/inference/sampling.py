"""From the scores of the next token to the token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_npu.inference.request import Sampling


class TokenChooser:
    """Chooses one answer's tokens. Draws are made on the host: the same seed gives the same answer on every device.

    Attributes:
        prompt_length: how many of the tokens so far are the prompt's.
    """

    def __init__(self, sampling: Sampling, prompt_length: int = 0, end_tokens: Collection[int] = ()):
        """
        Args:
            end_tokens: not chosen before `sampling.min_tokens`.
        """
        self._sampling = sampling
        self.prompt_length = prompt_length
        self._processors = _processors(sampling, prompt_length, end_tokens)
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


class _AnswerPenalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties: they count what is in the answer, not what is in the prompt."""

    def __init__(self, sampling: Sampling, prompt_length: int):
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens, counts = input_ids[0, self._prompt_length :].unique(return_counts=True)
        penalised = scores.clone()
        penalised[0, tokens] -= self._presence + self._frequency * counts.to(scores.dtype)
        return penalised


class _MinNewTokens(LogitsProcessor):
    """No end token before the answer has its least length."""

    def __init__(self, length: int, end_tokens: Collection[int]):
        self._length = length
        self._end_tokens = torch.tensor(sorted(end_tokens))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self._length:
            return scores
        return scores.index_fill(1, self._end_tokens, -torch.inf)


def _processors(sampling: Sampling, prompt_length: int, end_tokens: Collection[int]) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(_AnswerPenalties(sampling, prompt_length))
    if sampling.min_tokens and end_tokens:
        processors.append(_MinNewTokens(prompt_length + sampling.min_tokens, end_tokens))
    if not sampling.is_greedy:
        processors.append(TemperatureLogitsWarper(max(sampling.temperature, 1e-4)))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(MinPLogitsWarper(sampling.min_p))
    return processors
