"""One model that answers requests: limits checked, prompts prepared while the engine works, answers timed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from anyio import CapacityLimiter, to_thread

from llava_npu.data.images import load_image
from llava_npu.data.tools.defects import require_encodable
from llava_npu.errors import UserError
from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.prompts import prepare_prompt, prepare_rendered_prompt
from llava_npu.inference.request import Delta, Prompt, Request, Sampling
from llava_npu.models.processing import LlavaNpuProcessor
from llava_npu.serving.api.errors import ApiError, out_of_time
from llava_npu.serving.api.fetching import ImageFetcher
from llava_npu.serving.api.images import read_image
from llava_npu.serving.api.limits import Limits
from llava_npu.serving.api.messages import ParsedMessages
from llava_npu.serving.api.metrics import Metrics
from llava_npu.serving.background import BackgroundEngine, EngineStoppedError

_MAX_PREPARING = 2  # requests whose images are in memory as pixels
_MAX_STOPS, _MAX_STOP_CHARACTERS = 4, 200
_MAX_TOKEN_CHARACTERS = 64  # a text longer than this for each token of room is not even encoded


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    num_tokens: int
    finish_reason: str


class Service:
    """
    Attributes:
        name: of the model, as clients know it.
        created: when the service began, in seconds of Unix time.
    """

    def __init__(self, engine: InferenceEngine, name: str, limits: Limits, fetcher: ImageFetcher | None = None):
        """`fetcher`: None where images are taken from requests only."""
        self.name = name
        self.limits = limits
        self.created = int(time.time())
        self.metrics = Metrics()
        self.max_length = engine.max_length
        self.max_active = engine.max_batch + limits.max_waiting
        self._engine = engine
        self._background = BackgroundEngine(engine, self.metrics.observe_step)
        self._fetcher = fetcher
        self._preparing = CapacityLimiter(_MAX_PREPARING)

    @property
    def processor(self) -> LlavaNpuProcessor:
        return self._engine.processor

    @property
    def vocabulary_size(self) -> int:
        return int(self._engine.model.get_output_embeddings().weight.shape[0])

    @property
    def num_unfinished(self) -> int:
        return self._engine.num_running + self._engine.num_waiting

    @property
    def is_alive(self) -> bool:
        return self._background.is_alive

    def start(self) -> None:
        self._background.start()

    def stop(self) -> None:
        self._background.stop()

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def prepare_conversation(self, messages: ParsedMessages) -> Prompt:
        """Fetches, unpacks and encodes.

        Raises:
            UserError: images or turns that the model cannot read.
        """
        if len(messages.image_urls) > self.limits.max_images:
            raise UserError(
                f"{len(messages.image_urls)} images; this server takes {self.limits.max_images} (--max-images)"
            )
        self._check_length("".join(turn["value"] for turn in messages.turns) + (messages.system or ""))
        data = [
            await read_image(url, f"image {number}", self._fetcher) for number, url in enumerate(messages.image_urls, 1)
        ]
        return await self._in_thread(
            lambda: prepare_prompt(
                self.processor, messages.turns, self._open(data), system=messages.system, name="messages"
            )
        )

    async def prepare_text(self, text: str, images: list[bytes]) -> Prompt:
        """As `prepare_conversation`, of a prompt with its markup."""
        self._check_length(text)
        return await self._in_thread(lambda: prepare_rendered_prompt(self.processor, text, self._open(images)))

    def room(self, prompt: Prompt) -> int:
        """Tokens that an answer may have behind this prompt; none or fewer if it is too long itself."""
        return self.max_length - len(prompt.input_ids)

    async def stream(self, prompt: Prompt, sampling: Sampling, arrival: float) -> AsyncIterator[Delta]:
        """The answer as it grows; the last delta has its finish reason, "stop" or "length".

        Args:
            arrival: of the request, on `time.monotonic`'s clock.

        Raises:
            UserError: no room for such an answer.
            ApiError: it took too long, or failed.
        """
        self._engine.check(prompt, sampling)
        request = Request(prompt, sampling, deadline=arrival + self.limits.request_timeout)
        reason, tokens = "cancelled", 0
        try:
            async for delta in self._background.stream(request):
                if delta.num_tokens == 1:
                    self.metrics.observe_first_token(time.monotonic() - arrival)
                tokens = delta.num_tokens
                if delta.finish_reason:
                    reason = delta.finish_reason
                self._raise_failure(delta)
                yield delta
        except EngineStoppedError as error:
            raise ApiError(503, "the server is going down or its engine has failed", "not_serving") from error
        finally:
            seconds = time.monotonic() - arrival
            self.metrics.observe_answer(reason, len(prompt.input_ids), tokens, seconds)

    async def answer(self, prompt: Prompt, sampling: Sampling, arrival: float) -> Completion:
        """As `stream`, at once."""
        texts = []
        async for delta in self.stream(prompt, sampling, arrival):
            texts.append(delta.text)
            if delta.finish_reason:
                return Completion("".join(texts), delta.num_tokens, delta.finish_reason)
        raise AssertionError("an answer ends with its finish reason")

    def _raise_failure(self, delta: Delta) -> None:
        if delta.finish_reason == "timeout":
            raise out_of_time(self.limits.request_timeout)
        if delta.finish_reason == "error":
            what = f"{type(delta.error).__name__}: {delta.error}".splitlines()[0][:200]
            raise ApiError(500, f"generating failed: {what}", "generation_failed") from delta.error
        if delta.finish_reason == "cancelled":
            raise ApiError(503, "the server is going down", "not_serving")

    def _check_length(self, text: str) -> None:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError("the text has a lone surrogate (half a character), which no tokenizer reads; remove it")
        if len(text) > _MAX_TOKEN_CHARACTERS * self.max_length:
            raise UserError(
                f"a text of {len(text):,} characters; prompt and answer together may have {self.max_length} tokens"
            )

    def _open(self, images: list[bytes]) -> list:
        return [
            load_image(data, f"image {number}", max_pixels=self.limits.max_image_pixels)
            for number, data in enumerate(images, 1)
        ]

    async def _in_thread(self, work: Callable[[], Prompt]) -> Prompt:
        return await to_thread.run_sync(work, limiter=self._preparing)


def read_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """
    Raises:
        UserError: too many, an empty or a long one, or one that no answer can have.
    """
    stops = [stop] if isinstance(stop, str) else stop or []
    for each in stops:
        require_encodable(each, "stop")
    if len(stops) > _MAX_STOPS or not all(0 < len(each) <= _MAX_STOP_CHARACTERS for each in stops):
        raise UserError(f"stop: at most {_MAX_STOPS} texts of 1 to {_MAX_STOP_CHARACTERS} characters")
    return tuple(stops)
