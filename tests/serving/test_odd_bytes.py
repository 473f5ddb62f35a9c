"""No request gives a 500, whatever its text holds; keys may be any UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.running import http, make_service, running

KEY = "schlüssel-鍵"


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    with running(make_service(model_folder), api_key=KEY) as address:
        yield address


def post(address: str, path: str, body: bytes, key: str = KEY) -> int:
    headers = {b"Content-Type": b"application/json", b"Authorization": b"Bearer " + key.encode()}
    return http.post(f"{address}{path}", content=body, headers=list(headers.items())).status_code


def test_keys_may_be_any_utf_8(address: str) -> None:
    assert post(address, "/list_models", b"{}") == 200
    assert post(address, "/list_models", b"{}", "schlüssel-鎖") == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/get_worker_address", b" "),
        ("/get_worker_address", b"{"),
        ("/get_worker_address", b"\xff"),
        ("/v1/chat/completions", rb'{"messages":[{"role":"user","content":"\ud800"}]}'),
        ("/v1/chat/completions", rb'{"messages":[{"role":"user","content":"Hi"}],"stop":["\ud800"]}'),
        (
            "/v1/chat/completions",
            rb'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"\ud800"}}]}]}',
        ),
        (
            "/v1/chat/completions",
            rb'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:\ud800,AA"}}]}]}',
        ),
    ],
)
def test_odd_bodies_are_refused(address: str, path: str, body: bytes) -> None:
    assert post(address, path, body) == 400


def test_half_a_character_is_an_error_of_the_worker_protocol(address: str) -> None:
    headers = [(b"Authorization", b"Bearer " + KEY.encode()), (b"Content-Type", b"application/json")]
    reply = http.post(f"{address}/worker_generate_stream", content=rb'{"prompt":"\ud800"}', headers=headers)
    assert reply.status_code == 200
    assert b"lone surrogate" in reply.content
