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

    def __post_init__(self) -> None:
        for name, value, fine, allowed in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "above 0, up to 100"),
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
