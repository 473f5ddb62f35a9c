"""Listening on a port until told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from llava_npu.serving.api.app import build_app
from llava_npu.serving.api.ports import not_ours
from llava_npu.serving.api.service import Service


def serve(
    service: Service,
    listener: socket.socket,
    *,
    api_key: str | None,
    log_level: str,
    ready: Callable[[str], None],
    started: Callable[[uvicorn.Server], None] = lambda server: None,
) -> None:
    """Serves until interrupted.

    Args:
        ready: told the address once requests are taken.
        started: given the server, whose `should_exit` ends it too.
    """
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        build_app(service, api_key),
        log_level=log_level,
        access_log=log_level in ("info", "debug"),
        limit_concurrency=2 * service.max_admitted + 64,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=15,
        server_header=False,
        ws="none",
    )
    try:
        listener.listen(config.backlog)  # of two that reserved a port at the same time, one hears it here
    except OSError as error:
        raise not_ours(host, port, error) from error
    service.start()
    try:
        server = _Server(config, lambda: ready(f"http://{f'[{host}]' if ':' in host else host}:{port}"))
        started(server)
        server.run(sockets=[listener])
    finally:
        service.stop()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
