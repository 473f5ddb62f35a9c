"""What a request must pass before its body is read: key, form, size, and room for one more.

All of it costs next to nothing, and nothing of a refused request is kept: however many arrive, memory is bounded by
those admitted, each of at most `max_request_bytes`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_npu.serving.api.errors import ApiError, as_response
from llava_npu.serving.api.limits import MIB, Limits
from llava_npu.serving.api.metrics import Metrics

_OPEN_PATHS = frozenset({"/health", "/metrics"})
GENERATING_PATHS = frozenset({"/v1/chat/completions", "/worker_generate_stream"})


class Gate:
    """ASGI middleware.

    Attributes:
        admitted: requests that are being read or answered.
        held: bytes of their bodies.
    """

    def __init__(self, app: ASGIApp, limits: Limits, max_admitted: int, api_key: str | None, metrics: Metrics):
        self._app = app
        self.limits = limits
        self._max_admitted = max_admitted
        self._api_key = api_key
        self._metrics = metrics
        self.admitted = 0
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # if nothing is sent at all

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, send_and_see)
        finally:
            self._metrics.count_request(scope["path"], status)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        generates = scope["path"] in GENERATING_PATHS and scope["method"] == "POST"
        body = _Body(receive, self)
        try:
            headers = Headers(scope=scope)
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST":
                self._check_form(scope["path"], headers)
            if generates and self.admitted >= self._max_admitted:
                raise ApiError(
                    429, f"{self._max_admitted} requests are being answered or wait; try again", "queue_full"
                )
        except ApiError as error:
            await as_response(error)(scope, receive, send)
            return
        self.admitted += generates
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.admitted -= generates
            self.held -= body.read

    def hold(self, read: int, more: int) -> None:
        """Room for `more` bytes of a request that has `read` so far, or a refusal."""
        if read + more > self.limits.max_request_bytes:
            raise too_large(self.limits)
        if self.held + more > self.limits.max_held_bytes:
            raise ApiError(429, "the requests at hand are too large together; try again", "memory_full")
        self.held += more

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        if self._api_key is None or path in _OPEN_PATHS:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        # Headers are decoded as Latin-1; a key may be any UTF-8.
        fits = hmac.compare_digest(key.strip().encode("latin-1"), self._api_key.encode("utf-8", "surrogateescape"))
        if kind.lower() != "bearer" or not fits:
            raise ApiError(401, "this server wants its key: Authorization: Bearer …", "invalid_api_key")

    def _check_form(self, path: str, headers: Mapping[str, str]) -> None:
        # Also what keeps web pages out: a browser sends JSON to another origin only after asking, and we say no.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        empty = headers.get("content-length") == "0"
        if path.startswith("/v1/") or not empty:
            _require_json(kind)
        if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise ApiError(
                415, f"Content-Encoding is {coding[:40]}; this server unpacks nothing, send the body as it is"
            )
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise ApiError(400, f"Content-Length is {length!r}, not a number")
        if int(length) > self.limits.max_request_bytes:
            raise too_large(self.limits)


def _require_json(kind: str) -> None:
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind or 'missing'}; this server reads application/json")


def too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"the request is larger than {limits.max_request_bytes / MIB:g} MiB (--max-request-mib); "
        "send fewer or smaller pictures",
        "request_too_large",
    )


class _Body:
    """Counts a body's bytes as they come, and gives up on one that does not come."""

    def __init__(self, receive: Receive, gate: Gate):
        self.read = 0
        self._receive = receive
        self._gate = gate
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:  # what may still come is the client's leaving
            return await self._receive()
        seconds = self._gate.limits.read_timeout
        try:
            async with asyncio.timeout(seconds):
                message = await self._receive()
        except TimeoutError as error:
            reason = f"nothing of the body came for {seconds:g} s (--read-timeout)"
            raise ApiError(408, reason, "read_timeout") from error
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            self._gate.hold(self.read, more)
            self.read += more
            self._complete = not message.get("more_body", False)
        return message
