"""OpenAI's chat completions: https://platform.openai.com/docs/api-reference/chat."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from llava_npu.errors import UserError, nearest
from llava_npu.inference.request import Prompt, Sampling
from llava_npu.serving.api.errors import ApiError
from llava_npu.serving.api.event_stream import ByteStreamResponse, ClientLeftError, unless_client_leaves
from llava_npu.serving.api.messages import Message, read_messages
from llava_npu.serving.api.service import Service

_DEFAULT_NEW_TOKENS = 512  # if the client names no limit, and there is room
_MAX_STOPS = 4
# What would change the answer, and this server does not do: refused rather than ignored, but for what asks for nothing.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "verbosity": (None, "medium"),
    "reasoning_effort": (None, "none"),
    "web_search_options": (None,),
    "function_call": (None, "none", "auto"),
}
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
    }
)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel, extra="allow"):
    """What is read of a request; other fields are refused unless they have no effect on the answer."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
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
        arrival = time.monotonic()
        _require_model(service, body.model)
        _refuse_what_is_not_offered(body)
        try:
            work = service.prepare_conversation(read_messages(body.messages))
            prompt = await unless_client_leaves(request.receive, work)
            sampling = _sampling(body, service, prompt)
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                events = _events(service, prompt, sampling, arrival, usage)
                # What cannot begin is an error status, not a stream.
                await unless_client_leaves(request.receive, anext(events))
                return ByteStreamResponse(events, "text/event-stream", service.limits.read_timeout)
            answer = await unless_client_leaves(request.receive, service.answer(prompt, sampling, arrival))
        except ClientLeftError:
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
    service: Service, prompt: Prompt, sampling: Sampling, arrival: float, with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events; the first item is empty and says that generation has begun."""
    head = _head(service, "chat.completion.chunk")
    usage = {"usage": None} if with_usage else {}

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "choices": [choice], **usage})

    tokens, begun = 0, False
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
    if with_usage:
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


def _refuse_what_is_not_offered(body: ChatRequest) -> None:
    for name, value in (body.model_extra or {}).items():
        if name in _NOT_OFFERED:
            if value not in _NOT_OFFERED[name]:
                shown = json.dumps(value)
                shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
                reason = f"{name} is {shown}: this server does not offer it; leave it out"
                raise ApiError(400, reason, "not_offered", name)
        elif name not in _WITHOUT_EFFECT:
            hint = nearest(name, [*ChatRequest.model_fields, *_NOT_OFFERED])
            raise ApiError(400, f"unknown field {name[:60]!r}: leave it out.{hint}", "unknown_parameter", name[:60])


def _sampling(body: ChatRequest, service: Service, prompt: Prompt) -> Sampling:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > _MAX_STOPS or any(len(stop) > 200 for stop in stops):
        raise UserError(f"stop: at most {_MAX_STOPS} texts of up to 200 characters")
    limit = service.limits.max_new_tokens
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if wanted is not None and not 1 <= wanted <= limit:
        raise UserError(f"max_tokens is {wanted}; this server writes 1 to {limit} (--max-new-tokens)")
    if wanted is None:
        wanted = max(1, min(_DEFAULT_NEW_TOKENS, limit, service.room(prompt)))
    return Sampling(
        max_new_tokens=wanted,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=0 if body.top_k in (None, -1) else body.top_k,  # −1: all, as in vLLM
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=body.seed,
        stop=tuple(stops),
    )
