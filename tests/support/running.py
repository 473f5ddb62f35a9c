"""A server on a free port of this machine, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from llava_npu.inference.engine import InferenceEngine
from llava_npu.models import load
from llava_npu.serving.addresses import open_port
from llava_npu.serving.api.app import build_app
from llava_npu.serving.api.limits import Limits
from llava_npu.serving.api.service import Service
from llava_npu.serving.server import run_server


def make_service(model_folder: Path, *, max_batch: int = 8, limits: Limits | None = None, fetcher=None) -> Service:
    return Service(InferenceEngine(load(model_folder, "cpu"), max_batch=max_batch), "tiny", limits or Limits(), fetcher)


# Patient, since the machine may do much else; a connection each, since a kept one may be closed just then.
http = httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0))


@contextmanager
def running(service: Service, **options: Any) -> Iterator[str]:
    """The address of a service; `options` as `build_app` takes them."""
    with service, running_app(build_app(service, **options), service.limits.read_timeout) as address:
        yield address


@contextmanager
def running_app(app: Any, head_timeout: float = 60) -> Iterator[str]:
    """The address of an application."""
    listener = open_port("127.0.0.1", 0, 60)
    addresses: list[str] = []
    is_ready = threading.Event()
    servers: list = []

    def ready(address: str) -> None:
        addresses.append(address)
        is_ready.set()

    arguments = {"head_timeout": head_timeout, "ready": ready, "started": servers.append}
    thread = threading.Thread(target=run_server, args=(app, listener), kwargs=arguments, daemon=True)
    thread.start()
    assert is_ready.wait(300)
    try:
        yield addresses[0]
    finally:
        servers[0].should_exit = True
        thread.join(300)
        assert not thread.is_alive()


def connect(address: str) -> socket.socket:
    """A connection on which nothing is sent yet."""
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=300)
