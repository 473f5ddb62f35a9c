"""The generation engine: answers share the model's steps, and join and leave while others go on.

Each step reads prompts that are waiting, as far as there is room, and then adds one token to every answer in the
making (continuous batching, Yu et al. 2022, "Orca", OSDI). Prompts of different lengths are read packed end to end,
without padding. An answer does not depend on what else is computed beside it, up to the rounding of differently shaped
matrix products: with float32 the greedy answer is that of `generate`; in 16 bits a near tie may fall the other way, as
with any batching.

The engine is synchronous and not thread-safe: its owner calls `step` until nothing is left. `background.py` does so in
a thread for servers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from llava_npu.errors import UserError
from llava_npu.inference.detokenize import AnswerText
from llava_npu.inference.kv_cache import RowCache
from llava_npu.inference.prompts import prepare_prompt
from llava_npu.inference.request import FinishReason, Piece, Prompt, Sampling, Ticket
from llava_npu.inference.sampling import TokenChooser, choose_tokens
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.stopping import stop_string, stopping_arguments
from llava_npu.ops.attention.transformers_interface import ATTENTION_NAME
from llava_npu.ops.install import install_kernels

News = list[tuple[Ticket, Piece]]

_LONGEST = 4096  # by default: what Llama 2 was trained with
_PROMPT_TOKENS_PER_STEP = 4096  # more prompts wait for the next step, so that running answers do not stand still
_IMAGES_PER_STEP = 16


@dataclass(eq=False)
class _Running:
    """An answer in the making; its place in the engine's list is its row in the cache."""

    ticket: Ticket
    text: AnswerText
    chooser: TokenChooser
    tokens: list[int]  # prompt and answer
    num_new: int = 0
    finish_reason: FinishReason | None = field(default=None)


class Engine:
    """Answers of one model.

    Attributes:
        max_batch: answers at once; more wait.
        max_length: most tokens of prompt and answer together.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
    ):
        """
        Args:
            loaded: the model, as `llava_npu.load` returns it.
            max_length: by default what the model can, at most 4096.

        Raises:
            UserError: `max_length` is beyond what the model can, or its language model keeps another kind of memory
                than keys and values.
        """
        model, processor = loaded
        self.loaded = loaded
        self.model = model
        self.processor = processor
        self.max_batch = max_batch
        self.max_length = _usable_length(model, max_length)
        if model.config._attn_implementation != ATTENTION_NAME:
            install_kernels(model, model.device)
        self._cache = RowCache(model.config.text_config.num_hidden_layers, max_batch, self.max_length)
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Running] = []
        ends = stopping_arguments(model, processor.tokenizer, processor.template)["eos_token_id"]
        self._end_tokens = frozenset(ends or ())
        self._template_stop = stop_string(processor.template)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values take once the first prompt is read."""
        text = self.model.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = self.model.get_input_embeddings().weight.dtype.itemsize
        return 2 * text.num_hidden_layers * heads * head_dim * size * self.max_batch * self.max_length

    def warm_up(self) -> None:
        """Answers one question about a grey picture: memory is taken, and what cannot work is found out, before it is
        needed.
        """
        picture = Image.new("RGB", (64, 64), "grey")
        prompt = prepare_prompt(self.processor, [{"from": "human", "value": "<image>\nWhat?"}], [picture])
        for _ in self.generate(prompt, Sampling(max_new_tokens=2)):
            pass

    def check(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises `UserError` for a prompt that leaves no room for its answer."""
        room = self.max_length - len(prompt.input_ids)
        if sampling.max_new_tokens > room:
            images = f" ({prompt.num_images} images included)" if prompt.num_images else ""
            raise UserError(
                f"the prompt has {len(prompt.input_ids)} tokens{images} and up to {sampling.max_new_tokens} are asked "
                f"for, but prompt and answer together may have {self.max_length}. Ask for fewer, or shorten the prompt."
            )

    def submit(self, ticket: Ticket) -> None:
        """Puts an answer on the waiting list.

        Raises:
            UserError: as `check`.
        """
        self.check(ticket.prompt, ticket.sampling)
        self._waiting.append(ticket)

    def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """One answer, piece by piece, while nothing else uses the engine. Closing the iterator cancels it.

        Raises:
            UserError: as `check`; and whatever goes wrong while generating.
        """
        ticket = Ticket(prompt, sampling)
        self.submit(ticket)
        try:
            while self._waiting or self._running:
                for _, piece in self.step():
                    if piece.error is not None:
                        raise piece.error
                    yield piece
        finally:
            ticket.cancel()
            self._drop_given_up()

    @torch.no_grad()
    def step(self) -> News:
        """Reads waiting prompts and adds one token to every other running answer; returns what is new."""
        news = self._drop_given_up()
        older = len(self._running)
        if admitted := self._admit():
            news += self._guarded(admitted, self._read_prompts)
        if older:
            news += self._guarded(self._running[:older], self._continue)
        return news

    def _guarded(self, answers: list[_Running], compute: Callable[[list[_Running]], torch.Tensor]) -> News:
        """Whatever goes wrong belongs to the answers it was computed for; the engine goes on with the others."""
        try:
            return self._advance(answers, compute(answers))
        except Exception as error:  # noqa: BLE001  devices raise what they like
            for each in answers:
                each.finish_reason = "error"
            self._remove_finished()
            return [(each.ticket, Piece("", each.num_new, "error", error)) for each in answers]

    def _admit(self) -> list[_Running]:
        """Takes from the waiting list what one step reads."""
        admitted: list[_Running] = []
        tokens = tiles = 0
        while self._waiting and len(self._running) < self.max_batch:
            prompt = self._waiting[0].prompt
            tokens += len(prompt.input_ids)
            tiles += prompt.num_tiles
            if admitted and (tokens > _PROMPT_TOKENS_PER_STEP or tiles > _IMAGES_PER_STEP):
                break
            ticket = self._waiting.popleft()
            stops = [*ticket.sampling.stop, self._template_stop]
            text = AnswerText(self.processor.tokenizer, stops)
            running = _Running(ticket, text, TokenChooser(ticket.sampling), list(prompt.input_ids))
            admitted.append(running)
            self._running.append(running)
        return admitted

    def _read_prompts(self, admitted: list[_Running]) -> torch.Tensor:
        """(answers, vocabulary): scores of each answer's first token."""
        model, device = self.model, self.model.device
        lengths = [len(each.tokens) for each in admitted]
        packed = [token for each in admitted for token in each.tokens]
        places = [at for at, token in enumerate(packed) if token == model.config.image_token_id]
        pictures = [p for each in admitted if (p := each.ticket.prompt.pixel_values) is not None]
        first = len(self._running) - len(admitted)
        self._cache.expect_prompts(range(first, len(self._running)), lengths)
        input_ids = torch.tensor([packed]).to(device)
        images: dict[str, Any] = {}
        if pictures:
            images = {
                "pixel_values": torch.cat(pictures).to(device),
                "image_sizes": [size for each in admitted for size in each.ticket.prompt.image_sizes],
                "image_positions": torch.tensor(places).to(device),
            }
        hidden = model.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
            past_key_values=self._cache,
            sequence_lengths=lengths,
            use_cache=True,
            **images,
        ).last_hidden_state  # (1, tokens, hidden)
        ends = torch.tensor(lengths).cumsum(0) - 1
        return model.lm_head(hidden[0, ends.to(device)])

    def _continue(self, running: list[_Running]) -> torch.Tensor:
        """(answers, vocabulary): scores of each answer's next token, of which the latest is not in the cache yet."""
        model, device = self.model, self.model.device
        lengths = [len(each.tokens) - 1 for each in running]
        positions, mask = self._cache.expect_next(lengths, device)
        hidden = model.model(
            input_ids=torch.tensor([[each.tokens[-1]] for each in running]).to(device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state  # (answers, 1, hidden)
        return model.lm_head(hidden[:, -1])

    def _advance(self, answers: list[_Running], logits: torch.Tensor) -> News:
        tokens = choose_tokens(logits, [each.chooser for each in answers], [each.tokens for each in answers])
        news = [(each.ticket, self._take(each, token)) for each, token in zip(answers, tokens, strict=True)]
        self._remove_finished()
        return news

    def _take(self, answer: _Running, token: int) -> Piece:
        answer.tokens.append(token)
        answer.num_new += 1
        text = "" if token in self._end_tokens else answer.text.add(token)
        if token in self._end_tokens or answer.text.stopped:
            answer.finish_reason = "stop"
        elif answer.num_new >= answer.ticket.sampling.max_new_tokens:
            answer.finish_reason = "length"
        if answer.finish_reason:
            text += answer.text.finish()
        return Piece(text, answer.num_new, answer.finish_reason)

    def _drop_given_up(self) -> News:
        news: News = []
        kept: deque[Ticket] = deque()
        for ticket in self._waiting:
            if reason := ticket.given_up:
                news.append((ticket, Piece("", 0, reason)))
            else:
                kept.append(ticket)
        self._waiting = kept
        for each in self._running:
            if reason := each.ticket.given_up:
                each.finish_reason = reason
                news.append((each.ticket, Piece(each.text.finish(), each.num_new, reason)))
        self._remove_finished()
        return news

    def _remove_finished(self) -> None:
        """The last row moves into the place of a finished one."""
        row = 0
        while row < len(self._running):
            if self._running[row].finish_reason is None:
                row += 1
                continue
            last = self._running.pop()
            if row < len(self._running):
                self._running[row] = last
                if last.finish_reason is None:
                    self._cache.move_row(len(self._running), row, len(last.tokens) - 1)


def _usable_length(model: LlavaNpuForConditionalGeneration, wanted: int | None) -> int:
    """As long as every token sees all before it: rows know no sliding window."""
    text = model.config.text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"language model {text.model_type}: layers of kind {', '.join(sorted(others))} keep more than keys and "
            "values, which this engine cannot. Use transformers' generate() for this model."
        )
    slides = not kinds or "sliding_attention" in kinds
    window = getattr(text, "sliding_window", None) if slides else None
    limit = min(text.max_position_embeddings, window or text.max_position_embeddings)
    if wanted is not None and wanted > limit:
        raise UserError(f"max_length {wanted}: this model's language model reads {limit} tokens at most.")
    return wanted or min(limit, _LONGEST)
