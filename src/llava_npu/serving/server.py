"""Serving an ASGI application on a reserved port until told to stop."""

from __future__ import annotations

import socket
import time
from asyncio import TimerHandle, Transport
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_npu.serving.addresses import address_of, port_error

_MAX_IDLE = 256  # connections without a request in work; of more, the oldest is closed
_KEEP_ALIVE = 15  # seconds


def run_server(
    app: ASGIApp,
    listener: socket.socket,
    *,
    head_timeout: float,
    log_level: str = "error",
    ready: Callable[[str], None] = lambda address: None,
    started: Callable[[uvicorn.Server], None] = lambda server: None,
) -> None:
    """Serves until interrupted.

    Args:
        listener: from `open_port`.
        head_timeout: seconds after which a connection without a complete request head is closed.
        ready: told the address once requests are taken.
        started: given the server, whose `should_exit` ends it too.

    Raises:
        UserError: another program listens on the port meanwhile.
    """

    class Protocol(_PatientProtocol):
        patience = head_timeout

    config = uvicorn.Config(
        app,
        http=Protocol,
        log_level=log_level,
        access_log=log_level in ("info", "debug"),
        timeout_graceful_shutdown=10,
        timeout_keep_alive=_KEEP_ALIVE,
        server_header=False,
        ws="none",
    )
    try:
        listener.listen(config.backlog)  # of two that reserved a port at the same time, one hears it here
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise port_error(host, port, error) from error
    server = _Server(config, lambda: ready(address_of(listener)))
    started(server)
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


class _PatientProtocol(H11Protocol):
    """Closes connections whose request head does not come, however slowly it comes; and the oldest of too many.

    uvicorn limits the time between two requests of a connection, but waits for ever for the first byte of the first
    one, and for the rest of one that has begun.

    Attributes:
        patience: seconds for a head.
        waiting_since: when this connection began to wait for a head; None while a request is in work.
    """

    patience = 20.0
    waiting_since: float | None = None
    _timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = time.monotonic()
        self._limit_head()
        waiting = [
            (each.waiting_since, id(each), each.transport)
            for each in self.connections
            if isinstance(each, _PatientProtocol) and each.waiting_since is not None
        ]
        if len(waiting) > _MAX_IDLE:
            min(waiting)[2].abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_work:
            self._end_waiting()
        elif self._timer is None:  # the beginning of the next head
            self._limit_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_work:  # otherwise the next request had come already
            self.waiting_since = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_waiting()
        super().connection_lost(exc)

    @property
    def _in_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _limit_head(self) -> None:
        self._timer = self.loop.call_later(self.patience, self.transport.close)

    def _end_waiting(self) -> None:
        self.waiting_since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
