"""What is asked of the engine, and what it says about each answer as it grows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from llava_npu.errors import UserError

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it.

    Attributes:
        input_ids: token ids, each image as many image tokens as the model has for one.
        pixel_values: (images, 3, height, width) on the host, or None without images; with anyres, tiles of all images.
        image_sizes: (height, width) of each image.
    """

    input_ids: list[int]
    pixel_values: torch.Tensor | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def num_images(self) -> int:
        return len(self.image_sizes)

    @property
    def num_tiles(self) -> int:
        """How many pictures the vision tower sees for it."""
        return 0 if self.pixel_values is None else len(self.pixel_values)


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen, and where it ends at the latest.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token always; above, the next token is drawn.
        top_p: draw from the likeliest tokens that hold this share of the probability.
        top_k: draw from so many likeliest tokens; 0 for all.
        repetition_penalty: above 1, tokens that stand in prompt or answer become less likely (Keskar et al. 2019).
        seed: makes draws repeatable; None draws anew each time.
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
class Piece:
    """News of one answer.

    Attributes:
        text: what is new of it.
        num_tokens: tokens of the answer so far, its end token included.
        finish_reason: why it ends here; None while it goes on.
        error: what went wrong, with the reason "error".
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


@dataclass(eq=False)
class Ticket:
    """One answer in the making. Whoever asked for it may cancel it at any time, from any thread.

    Attributes:
        deadline: on `time.monotonic`'s clock, when it is given up.
        cancelled: whether nobody wants it any more.
    """

    prompt: Prompt
    sampling: Sampling
    deadline: float | None = None
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def given_up(self) -> FinishReason | None:
        """Why it should not go on, if so."""
        if self.cancelled:
            return "cancelled"
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "timeout"
        return None
