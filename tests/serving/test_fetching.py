"""No address of this network is ever connected to, whatever a URL looks like, however it gets there."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from llava_npu import UserError
from llava_npu.serving.api.fetching import Address, ImageFetcher, is_public
from support.running import http, make_service, running


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.0.8", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1",
        "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::7f00:1", "64:ff9b::7f00:1",
        "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:f5ff:fffe", "2001:db8::1",
    ],
)  # fmt: skip
def test_private_addresses(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


class _Web:
    """A web server on loopback, which the tests say is public, on one of two addresses."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.closing = threading.Event()
        web = self
        picture = io.BytesIO()
        Image.new("RGB", (30, 20), (200, 0, 0)).save(picture, "PNG")
        bodies = {"large": b"x" * 1000, "real.png": picture.getvalue()}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.headers["Host"], self.path))
                name = self.path.strip("/")
                if name.startswith("to="):
                    self.send_response(302)
                    self.send_header("Location", name[3:])
                    self.end_headers()
                    return
                self.send_response(404 if name == "absent" else 200)
                self.end_headers()
                try:
                    for _ in range(1000 if name == "large" else 1):
                        self.wfile.write(bodies.get(name, b"picture"))
                    if name == "slow":
                        web.closing.wait()
                except OSError:
                    pass

            def log_message(self, *arguments: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def web() -> Iterator[_Web]:
    server = _Web()
    yield server
    server.close()


def _fetch(url: str, names: dict[str, list[list[str]]] | None = None, timeout: float = 120) -> bytes:
    """Fetches where 127.0.0.1 alone counts as public; `names`: what each name's successive look-ups give."""

    def allowed(address: Address) -> bool:
        return str(address) == "127.0.0.1"

    async def resolve(host: str, port: int) -> list[str]:
        return (names or {})[host].pop(0)

    async def run() -> bytes:
        return await ImageFetcher(max_bytes=50_000, timeout=timeout, allowed=allowed, resolve=resolve).fetch(url)

    return asyncio.run(run())


def test_the_connection_goes_to_the_checked_address(web: _Web) -> None:
    names = {"cats.example": [["127.0.0.1"], ["10.0.0.1"]]}  # a second look-up would lead elsewhere
    assert _fetch(f"http://cats.example:{web.port}/cat.png", names) == b"picture"
    assert web.asked[-1] == (f"cats.example:{web.port}", "/cat.png")
    assert names["cats.example"] == [["10.0.0.1"]]


def test_one_private_address_among_several_is_enough_to_refuse(web: _Web) -> None:
    with pytest.raises(UserError, match=r"cats\.example is not a public address"):
        _fetch(f"http://cats.example:{web.port}/cat.png", {"cats.example": [["127.0.0.1", "10.0.0.1"]]})


def test_a_question_about_a_picture_on_the_web(web: _Web, model_folder: Path) -> None:
    def fetcher(allowed: Callable[[Address], bool]) -> ImageFetcher:
        return ImageFetcher(max_bytes=50_000, timeout=120, allowed=allowed)

    part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{web.port}/real.png"}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    with running(make_service(model_folder, fetcher=fetcher(lambda address: True))) as address:
        assert http.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    with running(make_service(model_folder, fetcher=fetcher(is_public))) as address:
        reply = http.post(f"{address}/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "127.0.0.1 is not a public address" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "target",
    ["http://inside.example/", "http://10.0.0.1/", "http://[::1]/", "http://169.254.169.254/latest/meta-data/"],
)
def test_redirections_are_checked_again(web: _Web, target: str) -> None:
    names = {
        "cats.example": [["127.0.0.1"]], "inside.example": [["10.0.0.1"]], "10.0.0.1": [["10.0.0.1"]],
        "::1": [["::1"]], "169.254.169.254": [["169.254.169.254"]],
    }  # fmt: skip
    with pytest.raises(UserError, match="is not a public address"):
        _fetch(f"http://cats.example:{web.port}/to={target}", names)


def test_an_address_that_cannot_be_reached_is_passed_by(web: _Web) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["::1", "127.0.0.1"]  # nothing listens on the first

    fetcher = ImageFetcher(max_bytes=50_000, timeout=300, allowed=lambda address: True, resolve=resolve)
    assert asyncio.run(fetcher.fetch(f"http://a.example:{web.port}/cat.png")) == b"picture"


def test_redirections_are_followed_but_not_for_ever(web: _Web) -> None:
    assert _fetch(f"http://a.example:{web.port}/to=/cat.png", {"a.example": [["127.0.0.1"]] * 2}) == b"picture"
    with pytest.raises(UserError, match="more than 3 redirections"):
        _fetch(f"http://a.example:{web.port}/to=/to=/to=/to=/to=/x", {"a.example": [["127.0.0.1"]] * 9})
    with pytest.raises(UserError, match="not an http or https URL"):
        _fetch(f"http://a.example:{web.port}/to=file:///etc/passwd", {"a.example": [["127.0.0.1"]]})
    with pytest.raises(UserError, match="cannot be fetched"):
        _fetch(f"http://a.example:{web.port}/to=http://[::1/", {"a.example": [["127.0.0.1"]]})


@pytest.mark.parametrize(
    ("path", "message"),
    [("absent", "status 404"), ("large", r"larger than 50,000 bytes"), ("slow", "not there after 0.5 s")],
)
def test_size_time_and_status(web: _Web, path: str, message: str) -> None:
    seconds = 0.5 if path == "slow" else 120
    with pytest.raises(UserError, match=message):
        _fetch(f"http://a.example:{web.port}/{path}", {"a.example": [["127.0.0.1"]]}, seconds)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://localhost/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/",
        "http://127.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[fe80::1%25lo]/", "http://0/",
        f"http://{'a' * 70}.example/", "http://a..example/", "http://user:key@127.0.0.1/", "http://127.0.0.1:1/", "HTTP://LOCALHOST/",
    ],
)  # fmt: skip
def test_the_real_check_refuses_every_way_to_write_this_machine(url: str) -> None:
    with pytest.raises(UserError, match=r"not a public address|cannot be fetched|not an http"):
        asyncio.run(ImageFetcher(max_bytes=1000, timeout=120).fetch(url))


@pytest.mark.parametrize(
    "url", ["ftp://a.example/", "http://", "http:///x", "http://a.example:x/", "http://bücher.example/"]
)
def test_other_urls(url: str) -> None:
    with pytest.raises(UserError, match="not an http or https URL"):
        asyncio.run(ImageFetcher(max_bytes=1000, timeout=120).fetch(url))
