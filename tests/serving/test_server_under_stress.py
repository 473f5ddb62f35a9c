"""Clients that leave, stall, crowd or come late: the server goes on, and gives back what they held."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_npu import UserError
from llava_npu.inference.request import Delta, Request
from llava_npu.serving.addresses import open_port
from llava_npu.serving.api.limits import Limits
from llava_npu.serving.api.service import Service
from support.running import connect, http, make_service, running

LONG = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 400, "temperature": 0}


@pytest.fixture
def service(model_folder: Path) -> Service:
    return make_service(model_folder, max_batch=2, limits=Limits(max_waiting=2))


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    with running(service) as address:
        yield address


def _slow_down(service: Service, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
    step = service._engine.step
    monkeypatch.setattr(service._engine, "step", lambda: time.sleep(seconds) or step())


def _until(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def _connect(address: str, body: dict) -> socket.socket:
    """Sends a request and reads nothing."""
    connection = connect(address)
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves(
    service: Service, address: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_down(service, monkeypatch)
    connections = [_connect(address, {**LONG, "stream": stream}) for _ in range(3)]  # two run, one waits
    _until(lambda: service.num_unfinished == 3)
    for connection in connections:
        connection.close()
    _until(lambda: service.num_unfinished == 0)
    assert 'answers_total{reason="cancelled"} 3' in http.get(f"{address}/metrics").text


def test_one_too_many_is_told_so_at_once(service: Service, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow_down(service, monkeypatch)
    connections = [_connect(address, LONG) for _ in range(4)]
    _until(lambda: service.num_unfinished == 4)
    reply = http.post(f"{address}/v1/chat/completions", json=LONG)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
    assert reply.headers["retry-after"] == "1"
    assert http.get(f"{address}/health").status_code == 200
    for connection in connections:
        connection.close()
    _until(lambda: service.num_unfinished == 0)
    assert http.post(f"{address}/v1/chat/completions", json={**LONG, "max_tokens": 1}).status_code == 200


def test_a_client_that_never_reads_holds_nothing(service: Service, address: str) -> None:
    connection = _connect(address, {**LONG, "stream": True})
    _until(lambda: service.num_unfinished == 1)
    _until(lambda: service.num_unfinished == 0)
    assert http.post(f"{address}/v1/chat/completions", json={**LONG, "max_tokens": 2}).status_code == 200
    connection.close()


def test_a_request_that_takes_too_long(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(model_folder, limits=Limits(request_timeout=0.5))
    _slow_down(service, monkeypatch)
    with running(service) as address:
        reply = http.post(f"{address}/v1/chat/completions", json=LONG)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")


def test_an_answer_that_takes_too_long_ends_in_the_middle(
    service: Service, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = service._engine.step

    def late() -> list[tuple[Request, Delta]]:
        deltas = list(step())
        for request, _ in deltas:  # its time is over as soon as it has a word
            request.deadline = 0.0
        return deltas

    monkeypatch.setattr(service._engine, "step", late)
    reply = http.post(f"{address}/v1/chat/completions", json={**LONG, "stream": True})
    assert reply.status_code == 200
    assert "--request-timeout" in reply.text.strip().rpartition("data: ")[2]
    assert "[DONE]" not in reply.text


def test_what_fails_while_generating_is_that_requests_error(
    service: Service, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(service._engine.model.model, "forward", fail)
        reply = http.post(f"{address}/v1/chat/completions", json=LONG)
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "generating failed: MemoryError: no memory")
    assert http.post(f"{address}/v1/chat/completions", json={**LONG, "max_tokens": 1}).status_code == 200


def test_a_dead_engine_is_said(service: Service, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise SystemError("beyond repair")

    monkeypatch.setattr(service._engine, "step", die)
    assert http.post(f"{address}/v1/chat/completions", json=LONG).status_code == 500
    assert http.get(f"{address}/health").status_code == 503
    assert http.post(f"{address}/v1/chat/completions", json=LONG).status_code == 503


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: in use on 127.0.0.1"):
            open_port("127.0.0.1", port, 5)
    with pytest.raises(UserError, match=r"--host no-such-host\.invalid"):
        open_port("no-such-host.invalid", 0, 5)
    with pytest.raises(UserError, match=r"--host a\.\.b: .* try 127\.0\.0\.1"):
        open_port("a..b", 0, 5)


@pytest.mark.slow
def test_the_command(model_folder: Path) -> None:
    command = [sys.executable, "-m", "llava_npu", "serve", "--model", str(model_folder), "--device", "cpu", "--port"]
    with subprocess.Popen([*command, "0", "--max-batch", "2"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "Ctrl-C stops" in line)
            address = next(word for word in line.split() if word.startswith("http://")).removesuffix("/v1")
            reply = http.post(f"{address}/v1/chat/completions", json={**LONG, "max_tokens": 2})
            assert reply.json()["model"] == "serving"
            port = address.rpartition(":")[2]
            other = subprocess.run([*command, port], capture_output=True, text=True, check=False, timeout=600)
            assert (other.returncode, other.stderr.startswith(f"error: --port {port}: in use")) == (2, True)
            process.send_signal(signal.SIGINT)
            assert process.wait(600) == 0
        finally:
            process.kill()
