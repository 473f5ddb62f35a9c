"""What a request must pass before it is worked on: host, key, form, size, time, and room for one more.

All of it costs next to nothing, and nothing of a refused request is kept: however many arrive, memory is bounded by
`max_held_bytes`. A place among the requests being answered is taken once the body is there, so that clients which send
slowly, or stop half-way, keep nobody else out.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_npu.serving.addresses import AllowedHosts
from llava_npu.serving.api.errors import ApiError, as_response, out_of_time
from llava_npu.serving.api.limits import MIB, Limits
from llava_npu.serving.api.service import Service

_OPEN_PATHS = frozenset({"/health", "/metrics"})
GENERATING_PATHS = frozenset({"/v1/chat/completions", "/worker_generate_stream"})


@dataclass
class _Usage:
    """What one client's requests hold.

    Attributes:
        uploads: bodies that are being read.
        held: bytes of its bodies, until they are answered.
    """

    uploads: int = 0
    held: int = 0


class AdmissionMiddleware:
    """ASGI middleware. It sets `request.state.arrival`, on `time.monotonic`'s clock.

    Attributes:
        limits: what requests may take.
        num_active: requests that are being answered or wait for it.
        held: bytes of all bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        *,
        api_key: str | None = None,
        hosts: AllowedHosts | None = None,
    ):
        self._app = app
        self.limits = service.limits
        self._max_active = service.max_active
        self._metrics = service.metrics
        self._api_key = api_key
        self._hosts = hosts or AllowedHosts()
        self._usage: dict[str, _Usage] = {}
        self.num_active = 0
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # if nothing is sent at all
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        scope.setdefault("state", {})["arrival"] = time.monotonic()
        try:
            # Answers end at their deadline by themselves; this ends what hangs elsewhere, and who reads too slowly.
            async with asyncio.timeout(self.limits.request_timeout + self.limits.read_timeout):
                await self._admit(scope, receive, send_and_note)
        except TimeoutError:
            if not started:
                await as_response(out_of_time(self.limits.request_timeout))(scope, receive, send_and_note)
        finally:
            self._metrics.count_request(scope["path"], status)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        generates = scope["path"] in GENERATING_PATHS and scope["method"] == "POST"
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST":
                self._check_form(scope["path"], headers)
            if generates:
                self._check_room()
            body = _Body(self, scope, receive, generates)
        except ApiError as error:
            await as_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.release()

    def usage_of(self, client: str) -> _Usage:
        return self._usage.setdefault(client, _Usage())

    def forget_idle(self, client: str) -> None:
        """Addresses come from outside: none is kept longer than it holds something."""
        if self._usage.get(client) == _Usage():
            del self._usage[client]

    def begin(self) -> None:
        """A request takes its place, or is refused."""
        self._check_room()
        self.num_active += 1

    def hold(self, usage: _Usage, read: int, more: int) -> None:
        """Room for `more` bytes of a request that has `read` so far, or a refusal."""
        if read + more > self.limits.max_request_bytes:
            raise _too_large(self.limits)
        if usage.held + more > self.limits.max_held_bytes_per_client:
            raise ApiError(429, "this client's requests are too large together; wait for their answers", "memory_full")
        if self.held + more > self.limits.max_held_bytes:
            raise ApiError(429, "the requests at hand are too large together; try again", "memory_full")
        usage.held += more
        self.held += more

    def _check_room(self) -> None:
        if self.num_active >= self._max_active:
            raise ApiError(429, f"{self._max_active} requests are being answered or wait; try again", "queue_full")

    def _check_host(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if host not in self._hosts:
            shown = f"Host is {host[:100]!r}" if host else "Host is missing"
            raise ApiError(
                403, f"{shown}; this server answers to loopback names and --allowed-hosts", "host_not_allowed"
            )

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
        if (path.startswith("/v1/") or _has_body(headers)) and kind != "application/json":
            raise ApiError(415, f"Content-Type is {kind[:40] or 'missing'}; this server reads application/json")
        if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise ApiError(
                415, f"Content-Encoding is {coding[:40]}; this server unpacks nothing, send the body as it is"
            )
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, f"Content-Length is {length[:40]!r}, not a number")
        if len(length) > 18 or int(length) > self.limits.max_request_bytes:
            raise _too_large(self.limits)


def _has_body(headers: Mapping[str, str]) -> bool:
    return headers.get("content-length") != "0"


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"the request is larger than {limits.max_request_bytes / MIB:g} MiB (--max-request-mib); "
        "send fewer or smaller images",
        "request_too_large",
    )


def _client_of(scope: Scope) -> str:
    """The address that requests are counted by; of IPv6 the network, since a client may use any address of its own."""
    host = str(scope["client"][0]) if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address) or address.ipv4_mapped:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False))  # the address has bits beyond the network


class _Body:
    """A request's body as it comes in: counted, and given up when it comes too slowly or not at all."""

    def __init__(self, admission: AdmissionMiddleware, scope: Scope, receive: Receive, generates: bool):
        """Raises `ApiError` where its client sends too many at a time."""
        self._admission = admission
        self._receive = receive
        self._generates = generates
        self._client = _client_of(scope)
        self._usage = admission.usage_of(self._client)
        self._deadline = time.monotonic() + admission.limits.request_timeout
        self._read = 0
        self._uploading = False
        self._complete = False
        self._active = False
        if scope["method"] == "POST" and _has_body(Headers(scope=scope)):
            if self._usage.uploads >= (most := admission.limits.max_uploads_per_client):
                raise ApiError(429, f"{most} requests of this client are still being sent; finish them", "uploads_full")
            self._usage.uploads += 1
            self._uploading = True

    async def receive(self) -> Message:
        if self._complete:  # what may still come is the client's leaving
            return await self._receive()
        message = await self._next()
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            self._admission.hold(self._usage, self._read, more)
            self._read += more
            if not message.get("more_body", False):
                self._finish()
        return message

    async def _next(self) -> Message:
        seconds = self._admission.limits.read_timeout
        left = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(seconds, left)):
                return await self._receive()
        except TimeoutError as error:
            if left < seconds:
                whole = self._admission.limits.request_timeout
                reason = f"the body is not complete after {whole:g} s (--request-timeout)"
            else:
                reason = f"nothing of the body came for {seconds:g} s (--read-timeout)"
            raise ApiError(408, reason, "read_timeout") from error

    def _finish(self) -> None:
        self._complete = True
        self._end_upload()
        if self._generates:
            self._admission.begin()
            self._active = True

    def _end_upload(self) -> None:
        self._usage.uploads -= self._uploading
        self._uploading = False

    def release(self) -> None:
        """The request is answered or refused."""
        self._end_upload()
        self._usage.held -= self._read
        self._admission.held -= self._read
        self._admission.num_active -= self._active
        self._admission.forget_idle(self._client)
