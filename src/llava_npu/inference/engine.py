"""The inference engine: requests share the model's steps, and join and leave while others continue.

Each step prefills prompts that are waiting, as far as there is room, and then decodes one token of every running answer
(continuous batching, Yu et al. 2022, "Orca", OSDI). Prompts of different lengths are packed end to end, without
padding; what a prompt begins with and the engine has computed before is not computed again (`prefix_cache.py`). An
answer does not depend on what else is computed with it, up to the rounding of differently shaped matrix products: with
float32 the greedy answer is that of `generate`; in 16 bits a near tie may fall the other way, as with any batching.

The engine is synchronous and not thread-safe: its owner calls `step` until nothing is left. For servers,
`serving/background.py` does so in a thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from llava_npu.errors import UserError
from llava_npu.inference.detokenize import AnswerText, stop_string, stopping_arguments, surrounding_space
from llava_npu.inference.features import FeatureCache
from llava_npu.inference.kv_cache import KVCache
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.inference.request import Delta, FinishReason, Prompt, Request, Sampling
from llava_npu.inference.runner import ModelRunner, Prefill
from llava_npu.inference.sampling import TokenChooser, choose_tokens
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.proof import examine

Event = tuple[Request, Delta]

_DEFAULT_MAX_LENGTH = 4096  # what Llama 2 was trained with
_PREFILL_TOKENS = 4096  # more prompts wait for the next step, so that running answers do not stand still
_PREFILL_TILES = 16
_OFFLINE_PREFIX_TOKENS = 1024  # for each sequence: an image and a question


@dataclass(eq=False)
class _Running:
    """An answer in the making; its place in the engine's list is its row in the cache."""

    request: Request
    text: AnswerText
    chooser: TokenChooser
    end_tokens: frozenset[int]
    tokens: list[int]  # prompt and answer
    num_new: int = 0
    finish_reason: FinishReason | None = field(default=None)


class InferenceEngine:
    """Answers the requests to one model.

    Attributes:
        loaded: the model and its processor.
        max_batch: maximum number of sequences decoded together; more wait.
        max_length: maximum number of tokens of prompt and answer together.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        prefix_tokens: int | None = None,
        reserve: bool = True,
        features: FeatureCache | None = None,
    ):
        """
        Args:
            loaded: the model, as `llava_npu.load` returns it.
            max_length: by default what the model can, at most 4096.
            prefix_tokens: how many tokens of earlier prompts and answers are kept for prompts that begin alike; by
                default an eighth of what `max_batch` sequences hold, and one sequence at least.
            reserve: take all memory at once, so that it cannot run out later; otherwise it grows with the sequences.
            features: keeps the vision tower's output; by default the engine's own.

        Raises:
            UserError: `max_length` is beyond what the model can, or its language model keeps another kind of memory
                than keys and values.
        """
        self.loaded = loaded
        self.model = loaded.model
        self.processor = loaded.processor
        self.max_batch = max_batch
        self.max_length = min(longest(loaded.model), _DEFAULT_MAX_LENGTH) if max_length is None else max_length
        if self.max_length > (limit := longest(loaded.model)):
            raise UserError(f"max_length {max_length}: this model's language model reads {limit} tokens at most.")
        if prefix_tokens is None:
            prefix_tokens = max(self.max_length, max_batch * self.max_length // 8)
        self._prefix_tokens = prefix_tokens
        cache = KVCache(loaded.model.config.text_config.num_hidden_layers, max_batch, self.max_length, reserve=reserve)
        self.runner = ModelRunner(loaded, cache, prefix_tokens, features)
        self._max_prefill_tokens = _PREFILL_TOKENS if reserve else None
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        ends = stopping_arguments(loaded.model, loaded.processor.tokenizer, loaded.processor.template)["eos_token_id"]
        self._end_tokens = frozenset(ends or ())
        self._template_stop = stop_string(loaded.processor.template)
        self._markup = surrounding_space(loaded.processor.tokenizer, loaded.processor.template)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values take once the first prompt is computed, those kept for later included."""
        text = self.model.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = self.model.get_input_embeddings().weight.dtype.itemsize
        tokens = self.max_batch * self.max_length + self._prefix_tokens
        return 2 * text.num_hidden_layers * heads * head_dim * size * tokens

    def warm_up(self) -> None:
        """Answers one question about a grey image: memory is taken, and what cannot work is found out, before it is
        needed.
        """
        image = Image.new("RGB", (64, 64), "grey")
        prompt = prepare_prompt(self.processor, [{"from": "human", "value": "<image>\nWhat?"}], [image])
        for _ in self.generate(prompt, Sampling(max_new_tokens=2)):
            pass

    def check(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises `UserError` for a prompt that leaves no room for its answer."""
        room = self.max_length - len(prompt.input_ids)
        if sampling.max_new_tokens > room:
            images = f" ({len(prompt.images)} images included)" if prompt.images else ""
            raise UserError(
                f"the prompt has {len(prompt.input_ids)} tokens{images} and up to {sampling.max_new_tokens} are asked "
                f"for, but prompt and answer together may have {self.max_length}. Ask for fewer, or shorten the prompt."
            )

    def submit(self, request: Request) -> None:
        """Puts a request on the waiting list.

        Raises:
            UserError: as `check`.
        """
        self.check(request.prompt, request.sampling)
        self._waiting.append(request)

    def run(self, requests: Sequence[Request]) -> list[str]:
        """The answers to some requests, in their order, while nothing else uses the engine.

        Raises:
            UserError: as `check`; and whatever goes wrong while generating.
        """
        texts = dict.fromkeys(requests, "")
        try:
            for request in requests:
                self.submit(request)
            while self._waiting or self._running:
                for request, delta in self.step():
                    if delta.error is not None:
                        raise delta.error
                    texts[request] += delta.text
        finally:
            for request in requests:
                request.cancel()
            self._drop_aborted()
        return list(texts.values())

    def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[Delta]:
        """One answer, delta by delta, while nothing else uses the engine. Closing the iterator cancels it.

        Raises:
            UserError: as `check`; and whatever goes wrong while generating.
        """
        request = Request(prompt, sampling)
        self.submit(request)
        try:
            while self._waiting or self._running:
                for _, delta in self.step():
                    if delta.error is not None:
                        raise delta.error
                    yield delta
        finally:
            request.cancel()
            self._drop_aborted()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Prefills waiting prompts and decodes one token of every other running answer; returns what is new."""
        events = self._drop_aborted()
        earlier = len(self._running)
        if admitted := self._admit():
            events += self._guarded(admitted, self._prefill)
        if earlier:
            events += self._guarded(self._running[:earlier], self._decode)
        return events

    def _guarded(self, answers: list[_Running], compute: Callable[[list[_Running]], torch.Tensor]) -> list[Event]:
        """Whatever goes wrong belongs to the answers it was computed for; the engine continues with the others."""
        try:
            return self._advance(answers, compute(answers))
        except Exception as error:  # noqa: BLE001  devices raise what they like
            for each in answers:
                each.finish_reason = "error"
            self._remove_finished()
            return [(each.request, Delta("", each.num_new, "error", error)) for each in answers]

    def _admit(self) -> list[_Running]:
        """Takes from the waiting list what one step prefills."""
        admitted: list[_Running] = []
        tokens = tiles = 0
        while self._waiting and len(self._running) < self.max_batch:
            prompt = self._waiting[0].prompt
            cached = self.runner.num_cached(prompt)
            tokens += len(prompt.input_ids) - cached
            tiles += sum(image.num_tiles for image in prompt.images if image.start >= cached)
            full = self._max_prefill_tokens is not None and tokens > self._max_prefill_tokens
            if admitted and (full or tiles > _PREFILL_TILES):
                break
            running = self._begin(self._waiting.popleft())
            admitted.append(running)
            self._running.append(running)
        return admitted

    def _begin(self, request: Request) -> _Running:
        sampling, ids = request.sampling, request.prompt.input_ids
        ends, stops = sampling.stop_token_ids, sampling.stop
        if not sampling.ignore_eos:
            ends, stops = ends | self._end_tokens, (*stops, self._template_stop)
        text = AnswerText(
            self.processor.tokenizer,
            stops,
            min_tokens=sampling.min_tokens,
            markup=None if sampling.strip else self._markup,
        )
        return _Running(request, text, TokenChooser(sampling, len(ids), ends), ends, list(ids))

    def _prefill(self, admitted: list[_Running]) -> torch.Tensor:
        """(answers, vocabulary): scores of each answer's first token."""
        first = len(self._running) - len(admitted)
        prefills = [Prefill(row, each.request.prompt) for row, each in enumerate(admitted, start=first)]
        return self.model.lm_head(torch.cat(self.runner.prefill(prefills)))

    def _decode(self, running: list[_Running]) -> torch.Tensor:
        """(answers, vocabulary): scores of each answer's next token, of which the latest is not in the cache yet."""
        lengths = [len(each.tokens) - 1 for each in running]
        return self.model.lm_head(self.runner.decode([each.tokens[-1] for each in running], lengths))

    def _advance(self, answers: list[_Running], logits: torch.Tensor) -> list[Event]:
        tokens = choose_tokens(logits, [each.chooser for each in answers], [each.tokens for each in answers])
        events = [(each.request, self._take(each, token)) for each, token in zip(answers, tokens, strict=True)]
        self._remove_finished()
        return events

    def _take(self, answer: _Running, token: int) -> Delta:
        answer.tokens.append(token)
        answer.num_new += 1
        text = "" if token in answer.end_tokens else answer.text.add(token)
        if token in answer.end_tokens or answer.text.stopped:
            answer.finish_reason = "stop"
        elif answer.num_new >= answer.request.sampling.max_new_tokens:
            answer.finish_reason = "length"
        if answer.finish_reason:
            text += answer.text.finish()
        return Delta(text, answer.num_new, answer.finish_reason)

    def _drop_aborted(self) -> list[Event]:
        events: list[Event] = []
        kept: deque[Request] = deque()
        for request in self._waiting:
            if reason := request.abort_reason:
                events.append((request, Delta("", 0, reason)))
            else:
                kept.append(request)
        self._waiting = kept
        for each in self._running:
            if reason := each.request.abort_reason:
                each.finish_reason = reason
                events.append((each.request, Delta(each.text.finish(), each.num_new, reason)))
        self._remove_finished()
        return events

    def _remove_finished(self) -> None:
        """The last row moves into the place of a finished one, whose keys are kept for the next turn."""
        for row, each in enumerate(self._running):
            if each.finish_reason not in (None, "error"):
                self.runner.keep(row, each.tokens[:-1], each.request.prompt.images)
        row = 0
        while row < len(self._running):
            if self._running[row].finish_reason is None:
                row += 1
                continue
            last = self._running.pop()
            if row < len(self._running):
                self._running[row] = last
                if last.finish_reason is None:
                    self.runner.cache.move_row(len(self._running), row, len(last.tokens) - 1)


def offline_engine(loaded: LoadedModel, max_batch: int, features: FeatureCache | None = None) -> InferenceEngine:
    """An engine for many questions that are all known: for any length, in memory that grows with what is needed."""
    return InferenceEngine(
        loaded,
        max_batch=max_batch,
        max_length=longest(loaded.model),
        prefix_tokens=_OFFLINE_PREFIX_TOKENS * max_batch,
        reserve=False,
        features=features,
    )


def longest(model: LlavaNpuForConditionalGeneration) -> int:
    """How many tokens the language model can read.

    Raises:
        UserError: it keeps another kind of memory than keys and values, or does not compute with them what it should.
    """
    text = model.config.text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    found = examine(text)
    reason = found.cache or found.packing
    if others := kinds - {"full_attention", "sliding_attention"}:
        reason = f"layers of kind {', '.join(sorted(others))} keep more than keys and values"
    if reason:
        raise UserError(
            f"language model {text.model_type}: {reason}, so that this engine cannot run it. Use transformers' "
            "generate() for this model."
        )
    limit: int = text.max_position_embeddings
    return limit
