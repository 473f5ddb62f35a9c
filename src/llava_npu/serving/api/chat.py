"""OpenAI's chat completions: https://platform.openai.com/docs/api-reference/chat.

Also read are the parameters that vLLM adds to it, which `vllm bench serve`, GuideLLM and EvalScope's perf send.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field
from starlette.responses import JSONResponse, Response

from llava_npu.errors import UserError, nearest
from llava_npu.inference.request import Prompt, Sampling
from llava_npu.serving.api.errors import ApiError
from llava_npu.serving.api.event_stream import ByteStreamResponse, ClientDisconnectedError, cancel_on_disconnect
from llava_npu.serving.api.messages import Message, read_messages
from llava_npu.serving.api.service import Service, read_stops

_DEFAULT_NEW_TOKENS = 512  # if the client names no limit, and there is room
_MAX_TEMPERATURE = 2.0  # OpenAI's
_MAX_STOP_TOKEN_IDS = 128
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "seed",
)
# What would change the answer and is not supported (OpenAI's, and vLLM's parameters): refused by name, but for the
# values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("audio", "web_search_options", "moderation", "prompt_logprobs", "logprob_token_ids", "allowed_token_ids",
         "truncate_prompt_tokens", "truncation_side", "thinking_token_budget", "chat_template", "structured_outputs",
         "guided_json", "guided_regex", "guided_choice", "guided_grammar", "repetition_detection"),
        (None,),
    ),
    **dict.fromkeys(
        ("logprobs", "use_beam_search", "include_stop_str_in_output", "watermarking", "echo", "continue_final_message",
         "add_special_tokens", "return_tokens_as_token_ids", "return_token_ids", "return_token_offsets",
         "return_prompt_text"),
        (None, False),
    ),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (None, True)),
    **dict.fromkeys(("n", "best_of", "length_penalty", "stream_interval"), (None, 1)),
    **dict.fromkeys(("tools", "functions", "bad_words", "documents"), (None, [])),
    **dict.fromkeys(
        ("logit_bias", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "kv_transfer_params",
         "ec_transfer_params", "vllm_xargs"),
        (None, {}),
    ),
    **dict.fromkeys(("tool_choice", "function_call"), (None, "none", "auto")),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "verbosity": (None, "medium"),
    "reasoning_effort": (None, "none"),
}  # fmt: skip
# What says nothing about the answer.
_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "include_reasoning",
        "priority",
        "request_id",
        "session_id",
        "cache_salt",
    }
)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read it as 0 or 1
        raise ValueError("a number is expected")
    return value


Number = Annotated[float, BeforeValidator(_not_bool)]
Whole = Annotated[int, BeforeValidator(_not_bool)]


class StreamOptions(BaseModel, extra="forbid"):
    """
    Attributes:
        include_usage: a last chunk with the counts of tokens.
        continuous_usage_stats: the counts in each chunk, with `include_usage` (vLLM's).
        include_obfuscation: OpenAI's padding against traffic analysis; nothing is padded here.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel, extra="allow"):
    """What is read of a request; other fields are refused unless they have no effect on the answer."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    min_tokens: Whole | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    async def describe_model(name: str) -> dict[str, Any]:
        _require_model(service, name)
        return _model(service)

    @router.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        arrival = request.state.arrival
        _require_model(service, body.model)
        _refuse_unsupported(body)
        try:
            work = service.prepare_conversation(read_messages(body.messages))
            prompt = await cancel_on_disconnect(request.receive, work)
            sampling = _sampling(body, service, prompt)
            if body.stream:
                events = _events(service, prompt, sampling, arrival, body.stream_options or StreamOptions())
                # What cannot begin is an error status, not a stream.
                await cancel_on_disconnect(request.receive, anext(events))
                return ByteStreamResponse(events, "text/event-stream", service.limits.read_timeout)
            answer = await cancel_on_disconnect(request.receive, service.answer(prompt, sampling, arrival))
        except ClientDisconnectedError:
            return Response(status_code=499)  # nobody reads it; nginx's number, for the counters
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        head = _head(service, "chat.completion")
        return JSONResponse({**head, "choices": [choice], "usage": _usage(prompt, answer.num_tokens)})

    return router


async def _events(
    service: Service, prompt: Prompt, sampling: Sampling, arrival: float, options: StreamOptions
) -> AsyncIterator[bytes]:
    """Server-sent events; the first item is empty and says that generation has begun."""
    head = _head(service, "chat.completion.chunk")
    tokens, begun = 0, False

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        counted = _usage(prompt, tokens) if options.continuous_usage_stats else None
        usage = {"usage": counted} if options.include_usage else {}
        return _event({**head, "choices": [choice], **usage})

    try:
        async for delta in service.stream(prompt, sampling, arrival):
            tokens = delta.num_tokens
            if not begun:
                begun = True
                yield b""
                yield chunk({"role": "assistant", "content": "", "refusal": None})
            if delta.text:
                yield chunk({"content": delta.text})
            if delta.finish_reason:
                yield chunk({}, delta.finish_reason)
    except ApiError as error:
        if not begun:
            raise
        yield _event(error.body)
        return
    if options.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(prompt, tokens)})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _head(service: Service, kind: Literal["chat.completion", "chat.completion.chunk"]) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.name}


def _usage(prompt: Prompt, tokens: int) -> dict[str, int]:
    read = len(prompt.input_ids)
    return {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "llava-npu",
        "max_model_len": service.max_length,
    }


def _require_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        raise ApiError(404, f"model {name!r}: this server has {service.name!r}", "model_not_found", "model")


def _refuse_unsupported(body: ChatRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options without stream: true; leave it out", "unsupported_parameter", "stream_options"
        )
    for name, value in (body.model_extra or {}).items():
        if name in _UNSUPPORTED:
            if not any(_same(value, neutral) for neutral in _UNSUPPORTED[name]):
                shown = json.dumps(value)
                shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
                reason = f"{name} is {shown}: this server does not support it; leave it out"
                raise ApiError(400, reason, "unsupported_parameter", name)
        elif name not in _WITHOUT_EFFECT:
            hint = nearest(name, [*ChatRequest.model_fields, *_UNSUPPORTED])
            raise ApiError(400, f"unknown field {name[:60]!r}: leave it out.{hint}", "unknown_parameter", name[:60])


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: true is not 1, but 1.0 is."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _sampling(body: ChatRequest, service: Service, prompt: Prompt) -> Sampling:
    if body.temperature is not None and not 0 <= body.temperature <= _MAX_TEMPERATURE:
        raise UserError(f"temperature is {body.temperature}; allowed is 0 to {_MAX_TEMPERATURE:g}.")
    limit = service.limits.max_new_tokens
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if wanted is not None and not 1 <= wanted <= limit:
        raise UserError(f"max_tokens is {wanted}; this server writes 1 to {limit} (--max-new-tokens)")
    if wanted is None:
        wanted = max(1, min(_DEFAULT_NEW_TOKENS, limit, service.room(prompt)))
    given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    if given.get("top_k") == -1:  # all, as in vLLM
        given["top_k"] = 0
    return Sampling(
        max_new_tokens=wanted,
        stop=read_stops(body.stop),
        stop_token_ids=_stop_token_ids(body, service),
        strip=False,
        **{"temperature": 1.0, **given},
    )


def _stop_token_ids(body: ChatRequest, service: Service) -> frozenset[int]:
    ids = body.stop_token_ids or []
    if len(ids) > _MAX_STOP_TOKEN_IDS:
        raise UserError(f"stop_token_ids: {len(ids)} of them; at most {_MAX_STOP_TOKEN_IDS}")
    for token in ids:
        if not 0 <= token < service.vocabulary_size:
            raise UserError(f"stop_token_ids: {token}; this model's token ids are 0 to {service.vocabulary_size - 1}")
    return frozenset(ids)
