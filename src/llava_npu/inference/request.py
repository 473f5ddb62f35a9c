"""What is asked of the engine, and what it reports about each answer as it grows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from llava_npu.errors import UserError

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image of a prompt: its pixels as the tower takes them, or what the tower gave for them.

    Attributes:
        key: equal for equal images, so that what was computed for one serves the other.
        size: (height, width) of the image.
        start, length: the image tokens that stand for it in the prompt.
        pixel_values: (tiles, 3, height, width) on the host; an image is one tile unless the model cuts it (anyres).
        features: (tiles, tokens, channels) on the host, in place of pixels.
    """

    key: str
    size: tuple[int, int]
    start: int
    length: int
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def num_tiles(self) -> int:
        """How many tiles the vision tower has to see for it."""
        return 0 if self.pixel_values is None else len(self.pixel_values)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it.

    Attributes:
        input_ids: token ids, each image as many image tokens as the model has for one.
        images: in the order of the text.
    """

    input_ids: list[int]
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and where it ends at the latest.

    Attributes:
        max_new_tokens: maximum length of the answer.
        temperature: 0 always takes the most likely token; above, the next token is drawn.
        top_p: draw from the most likely tokens that hold this share of the probability.
        top_k: draw from the k most likely tokens; 0 for all.
        repetition_penalty: above 1, tokens of the prompt and the answer become less likely (Keskar et al. 2019).
        seed: makes draws repeatable; None draws differently each time.
        stop: the answer ends before the first of these texts.
        min_p: draw from the tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024).
        presence_penalty: subtracted from the score of each token that the answer has already, as OpenAI defines it.
        frequency_penalty: the same for each time that it has it.
        min_tokens: no end token and no stop text counts before the answer has this many tokens.
        ignore_eos: neither the model's end tokens nor the template's end mark end the answer.
        stop_token_ids: further end tokens.
        strip: remove white space around the answer, as LLaVA's evaluation does.

    Raises:
        UserError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    strip: bool = True

    def __post_init__(self) -> None:
        for name, value, fine, allowed in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "above 0, up to 100"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
        ):
            if not fine:
                raise UserError(f"{name} is {value}; allowed is {allowed}.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Delta:
    """What is new about one answer.

    Attributes:
        text: new text of the answer.
        num_tokens: tokens of the answer so far, its end token included.
        finish_reason: why it ends here; None while it continues.
        error: what went wrong, with the reason "error".
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


@dataclass(eq=False)
class Request:
    """A prompt waiting for its answer, or being answered. It can be cancelled at any time, from any thread.

    Attributes:
        deadline: on `time.monotonic`'s clock, when it times out.
        cancelled: whether nobody wants the answer any more.
    """

    prompt: Prompt
    sampling: Sampling
    deadline: float | None = None
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def abort_reason(self) -> FinishReason | None:
        """Why it should be aborted, if it should."""
        if self.cancelled:
            return "cancelled"
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "timeout"
        return None
