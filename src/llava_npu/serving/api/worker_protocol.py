"""LLaVA's own serving protocol (llava/serve/model_worker.py and controller.py), so that its clients keep working.

One process stands for both: a client may ask for models and their address as it asks the controller, and for answers
as it asks a worker. The prompt comes with its markup, so the template is the client's; answers come as JSON values
separated by a zero byte, each with the whole text so far, prompt included. Errors are answers with an `error_code`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from llava_npu.errors import UserError
from llava_npu.inference.request import Prompt, Sampling
from llava_npu.serving.api.errors import ApiError
from llava_npu.serving.api.event_stream import ByteStreamResponse, ClientDisconnectedError, cancel_on_disconnect
from llava_npu.serving.api.images import decode_base64
from llava_npu.serving.api.service import Service, read_stops

_WORKER_FAILED = 1
_SAMPLED_ABOVE = 0.001  # temperatures up to here mean: the likeliest token


class AddressRequest(BaseModel):
    model: str | None = None


class WorkerRequest(BaseModel):
    prompt: str
    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: str | list[str] | None = None
    images: list[str] | None = None


def worker_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/worker_get_status")
    async def status() -> dict[str, Any]:
        return {"model_names": [service.name], "speed": 1, "queue_length": service.num_unfinished}

    @router.post("/refresh_all_workers")
    async def refresh() -> None:
        return None

    @router.post("/list_models")
    async def list_models() -> dict[str, Any]:
        return {"models": [service.name]}

    @router.post("/get_worker_address")
    async def address(body: AddressRequest, request: Request) -> dict[str, str]:
        return {"address": str(request.base_url).rstrip("/") if body.model == service.name else ""}

    @router.post("/worker_generate_stream")
    async def generate(body: WorkerRequest, request: Request) -> Response:
        try:
            prompt = await cancel_on_disconnect(request.receive, _prepare(service, body))
            deltas = _deltas(service, body, prompt, request.state.arrival)
        except UserError as error:
            deltas = _one(_chunk(str(error), _WORKER_FAILED))
        except ClientDisconnectedError:
            return Response(status_code=499)
        return ByteStreamResponse(deltas, "application/octet-stream", service.limits.read_timeout)

    return router


async def _prepare(service: Service, body: WorkerRequest) -> Prompt:
    images = body.images or []
    if len(images) > service.limits.max_images:
        raise UserError(f"{len(images)} images; this server takes {service.limits.max_images} (--max-images)")
    data = [decode_base64(image, f"image {number}") for number, image in enumerate(images, 1)]
    return await service.prepare_text(body.prompt, data)


async def _deltas(service: Service, body: WorkerRequest, prompt: Prompt, arrival: float) -> AsyncIterator[bytes]:
    text = body.prompt
    try:
        async for delta in service.stream(prompt, _sampling(body, service, prompt), arrival):
            if delta.text or delta.finish_reason:
                text += delta.text
                yield _chunk(text, 0)
    except (UserError, ApiError) as error:
        yield _chunk(str(error), _WORKER_FAILED)


async def _one(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk


def _chunk(text: str, error_code: int) -> bytes:
    return json.dumps({"text": text, "error_code": error_code}).encode() + b"\0"


def _sampling(body: WorkerRequest, service: Service, prompt: Prompt) -> Sampling:
    # As LLaVA's worker: what is too long is cut, not refused.
    most = max(1, min(body.max_new_tokens, service.limits.max_new_tokens, service.room(prompt)))
    return Sampling(
        max_new_tokens=most,
        temperature=body.temperature if body.temperature > _SAMPLED_ABOVE else 0.0,
        top_p=body.top_p,
        stop=read_stops(body.stop or None),
    )
