"""Requests as an attacker sends them, byte by byte on raw sockets: nobody else is held up, and no more is held."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.types import Message, Receive, Scope, Send

from llava_npu.errors import UserError
from llava_npu.serving import server
from llava_npu.serving.addresses import AllowedHosts
from llava_npu.serving.api.admission import AdmissionMiddleware
from llava_npu.serving.api.app import build_app
from llava_npu.serving.api.limits import Limits
from llava_npu.serving.api.metrics import Metrics
from support.running import connect, http, make_service, running, running_app

QUESTION = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2, "temperature": 0}
PATH = "/v1/chat/completions"
# Four requests may be in work, each client may be sending three.
LIMITS = Limits(max_waiting=2, max_uploads_per_client=3, read_timeout=1.0, request_timeout=6.0)


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    with running(make_service(model_folder, max_batch=2, limits=LIMITS)) as address:
        assert http.post(f"{address}{PATH}", json=QUESTION).status_code == 200  # warm
        yield address


def head(length: object, more: str = "") -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def reply_to(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    try:
        while more := connection.recv(65536):
            received += more
    except ConnectionResetError:
        pass
    return received


def drip(connection: socket.socket, seconds: float = 60) -> bytes:
    """Sends a byte each tenth of a second until the server answers or has closed; what it said."""
    end = time.monotonic() + seconds
    connection.settimeout(0.1)
    while time.monotonic() < end:
        try:
            connection.sendall(b"x")
            return connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return b""
    raise AssertionError("the server waits for ever")


@pytest.mark.parametrize("begun", [b"", b"POST", b"POST / HTTP/1.1\r\nHost: localhost\r\nX-Long: "])
def test_a_head_that_does_not_come(address: str, begun: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(begun)
        assert reply_to(connection) == b""


def test_a_head_that_comes_byte_by_byte(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert drip(connection) == b""


def test_a_second_head_that_comes_byte_by_byte(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert drip(connection) == b""


def test_a_head_without_end(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 100_000)
        assert reply_to(connection)[:12] in (b"HTTP/1.1 400", b"")


def test_a_body_that_does_not_come(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(head(99) + b"{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_body_that_comes_byte_by_byte(address: str) -> None:
    """No single wait is long, but its whole time is limited."""
    with connect(address) as connection:
        connection.sendall(head(10_000) + b'{"')
        said = drip(connection)
        connection.settimeout(300)
        said += reply_to(connection)
    assert said.startswith(b"HTTP/1.1 408")
    assert b"--request-timeout" in said


def test_slow_bodies_keep_nobody_out(address: str) -> None:
    """As many as there are places, from several clients; whoever sends its request gets its answer."""
    connections = [connect(address) for _ in range(6)]
    for number, connection in enumerate(connections):
        connection.sendall(head(99, f"X-Forwarded-For: 203.0.113.{number % 2}\r\n") + b"{")
    try:
        for _ in range(3):
            assert http.post(f"{address}{PATH}", json=QUESTION).status_code == 200
    finally:
        for connection in connections:
            connection.close()


def test_one_client_sends_so_many_at_a_time() -> None:
    reading: list[str] = []

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        reading.append(scope["client"][0])
        await receive()

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def ask(admission: AdmissionMiddleware, client: str) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"99")]
        scope = {"type": "http", "method": "POST", "path": PATH, "client": (client, 1), "headers": headers}
        await admission(scope, never, send)
        return sent

    async def run() -> list[Message]:
        service = SimpleNamespace(limits=Limits(max_uploads_per_client=3), max_active=4, metrics=Metrics())
        admission = AdmissionMiddleware(read, service)  # type: ignore[arg-type]
        clients = ["2001:db8::1", "2001:db8::2", "2001:db8::1", "198.51.100.7"]  # three of one network
        slow = [asyncio.create_task(ask(admission, client)) for client in clients]
        while len(reading) < len(clients):
            await asyncio.sleep(0)
        refused = await ask(admission, "2001:db8::3")
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert (admission.num_active, admission.held, admission._usage) == (0, 0, {})
        return refused

    start, body = asyncio.run(run())
    assert (start["status"], b"uploads_full" in body["body"]) == (429, True)


def test_one_client_holds_so_much() -> None:
    limits = Limits(max_request_bytes=200 * 2**20)
    service = SimpleNamespace(limits=limits, max_active=4, metrics=None)
    admission = AdmissionMiddleware(None, service)  # type: ignore[arg-type]
    mine, yours = admission.usage_of("me"), admission.usage_of("you")
    admission.hold(mine, 0, limits.max_held_bytes_per_client)
    with pytest.raises(Exception, match="this client's requests are too large together"):
        admission.hold(mine, 0, 1)
    admission.hold(yours, 0, limits.max_request_bytes)
    assert admission.held == mine.held + yours.held
    with pytest.raises(Exception, match="larger than 200 MiB"):
        admission.hold(yours, limits.max_request_bytes, 1)


def test_idle_connections_keep_nobody_out(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MAX_IDLE", 8)
    connections = [connect(address) for _ in range(20)]
    assert http.get(f"{address}/health").status_code == 200
    assert reply_to(connections[0]) == b""  # the oldest has gone
    for connection in connections:
        connection.close()


def test_nothing_is_left_of_them(model_folder: Path) -> None:
    service = make_service(model_folder, max_batch=2, limits=LIMITS)
    app = build_app(service)
    assert isinstance(app, AdmissionMiddleware)
    with service, running_app(app, 1.0) as address:
        for content in (head(99) + b"{", head(2) + b"{}", head(10**12), head(4) + b"nope"):
            with connect(address) as connection:
                connection.sendall(content)
                assert connection.recv(100)
        assert http.post(f"{address}{PATH}", json=QUESTION).status_code == 200
    assert (app.num_active, app.held, app._usage) == (0, 0, {})


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "١", "9" * 400, "5, 6", ""])
def test_lengths_that_are_none(address: str, length: str) -> None:
    with connect(address) as connection:
        connection.sendall(head(length) + b"{}")
        assert connection.recv(65536)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")


def test_other_names_are_refused(address: str) -> None:
    """As after a name was rebound to this address (DNS rebinding)."""
    for path in (PATH, "/v1/models", "/health", "/metrics", "/list_models", "/nowhere"):
        reply = http.get(f"{address}{path}", headers={"Host": "evil.example"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")
    reply = http.post(f"{address}{PATH}", json=QUESTION, headers={"Host": "evil.example:8000"})
    assert "Host is 'evil.example:8000'; this server answers to loopback names and --allowed-hosts" in reply.text
    with connect(address) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b"Host is missing" in reply_to(connection)


@pytest.mark.parametrize(
    ("bound", "names", "allowed", "refused"),
    [
        ("127.0.0.1", [], ["localhost", "127.0.0.1:1", "[::1]:8000"], ["a.example", "10.0.0.1", "", "localhost:x"]),
        ("0.0.0.0", [], ["10.0.0.1:80", "[2001:db8::1]", "localhost"], ["a.example", "10.0.0.1.a.example"]),
        ("0.0.0.0", ["llava", "A.example."], ["llava:80", "a.EXAMPLE"], ["b.a.example", "x@llava", "llava/x"]),
        ("gpu-7.lan", [], ["gpu-7.lan:8000", "10.0.0.7"], ["gpu-8.lan"]),
        ("127.0.0.1", ["*"], ["whatever.example", ""], []),
        ("127.0.0.1", ["münchen.example", "::2"], ["xn--mnchen-3ya.example", "[::2]:80"], []),
    ],
)  # fmt: skip
def test_allowed_hosts(bound: str, names: list[str], allowed: list[str], refused: list[str]) -> None:
    hosts = AllowedHosts(bound, names)
    assert [host for host in allowed if host not in hosts] == []
    assert [host for host in refused if host in hosts] == []


@pytest.mark.parametrize("name", ["a.example:80", "http://a.example", "a.example,b.example", "*.example", "", "a..b"])
def test_names_that_no_client_calls_by_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="a name or an address is expected, without scheme and port"):
        AllowedHosts("127.0.0.1", [name])


@pytest.mark.parametrize("wrong", [{"request_timeout": float("nan")}, {"read_timeout": 0}, {"max_images": -1}])
def test_limits_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is "):
        Limits(**wrong)  # type: ignore[arg-type]


def test_pipelined_requests_are_answered_in_turn(address: str) -> None:
    body = json.dumps(QUESTION).encode()
    with connect(address) as connection:
        connection.sendall((head(len(body)) + body) * 3 + head(len(body), "Connection: close\r\n") + body)
        assert reply_to(connection).count(b"HTTP/1.1 200") == 4
