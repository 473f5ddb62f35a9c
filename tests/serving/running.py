"""A server on a free port of this machine, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from llava_npu.inference.engine import Engine
from llava_npu.models import load
from llava_npu.serving.api.limits import Limits
from llava_npu.serving.api.ports import open_port
from llava_npu.serving.api.server import serve
from llava_npu.serving.api.service import Service


def make_service(model_folder: Path, *, max_batch: int = 8, limits: Limits | None = None, fetcher=None) -> Service:
    return Service(Engine(load(model_folder, "cpu"), max_batch=max_batch), "tiny", limits or Limits(), fetcher)


# Patient, since the machine may do much else; a connection each, since a kept one may be closed just then.
http = httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0))


@contextmanager
def running(service: Service, api_key: str | None = None) -> Iterator[str]:
    """The server's address."""
    listener = open_port("127.0.0.1", 0, 60)
    addresses: list[str] = []
    is_ready = threading.Event()
    servers: list = []

    def ready(address: str) -> None:
        addresses.append(address)
        is_ready.set()

    arguments = {"api_key": api_key, "log_level": "error", "ready": ready, "started": servers.append}
    thread = threading.Thread(target=serve, args=(service, listener), kwargs=arguments, daemon=True)
    thread.start()
    assert is_ready.wait(300)
    try:
        yield addresses[0]
    finally:
        servers[0].should_exit = True
        thread.join(300)
        assert not thread.is_alive()
