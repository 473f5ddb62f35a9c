"""Requests that nobody thought of: made from the server's own OpenAPI document, and good ones damaged byte by byte.

Each gets an answer (2xx) or one clear error (4xx), none a 500, and the server stays well. The cases are the same in
every run. More of them: LLAVA_NPU_API_CASES=2000 python -m pytest tests/serving/test_openapi.py
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from PIL import Image

from llava_npu.serving.api.limits import Limits
from support.running import make_service, running

CASES = int(os.environ.get("LLAVA_NPU_API_CASES", "30"))  # of each operation; of damaged requests eight times as many
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/worker_generate_stream"),
    ("POST", "/get_worker_address"),
    ("POST", "/worker_get_status"),
    ("POST", "/refresh_all_workers"),
    ("POST", "/list_models"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    limits = Limits(max_request_bytes=200_000, max_new_tokens=8, max_image_pixels=10_000, max_images=3)
    with running(make_service(model_folder, limits=limits)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def schema(address: str) -> Any:
    return schemathesis.openapi.from_url(f"{address}/openapi.json", headers={"Host": "localhost"})


def check(path: str, status: int, content: bytes) -> None:
    assert 200 <= status < 300 or 400 <= status < 500, (path, status, content[:300])
    if status >= 400:
        error = json.loads(content)["error"]
        assert error["message"], path
        assert "Traceback" not in error["message"]
    elif path == "/worker_generate_stream":  # this protocol's errors are answers
        for chunk in content.split(b"\0")[:-1]:
            assert json.loads(chunk)["error_code"] in (0, 1)


def test_the_document_names_every_operation(schema: Any) -> None:
    found = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_document_allows_and_what_it_does_not(
    schema: Any, client: httpx.Client, method: str, path: str
) -> None:
    operation = schema[path][method]
    outcomes: Counter[int] = Counter()

    @seed(1)
    @settings(
        max_examples=CASES if method == "POST" else max(2, CASES // 10),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        response = case.call(base_url=str(client.base_url).rstrip("/"), timeout=300)
        outcomes[response.status_code] += 1
        check(path, response.status_code, response.content)

    ask()
    assert outcomes.total() >= 1
    assert client.get("/health").json()["status"] == "ok"


def _image_url() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


GOOD: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": _image_url()}},
                    ],
                },
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "Why?"},
            ],
            "max_tokens": 3,
            "min_tokens": 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.1,
            "seed": 1,
            "stop": ["zz"],
            "stop_token_ids": [3],
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "n": 1,
            "logprobs": False,
            "user": "me",
        },
    ),
    (
        "/worker_generate_stream",
        {
            "model": "tiny",
            "prompt": "<image>\nWhat?",
            "images": [_image_url().partition(",")[2]],
            "max_new_tokens": 3,
            "temperature": 0.2,
            "top_p": 0.7,
            "stop": "zz",
        },
    ),
    ("/get_worker_address", {"model": "tiny"}),
]
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", " ", "x", "\ud83d", "\0",
    "<image>", "<|im_end|>", "\u202e", "é" * 300, [], {}, [[]], [None], {"a": None}, {"type": "text"}, ["a"] * 9, [{}],
    "data:image/png;base64,AAAA", "data:\ud800,AA", "http://127.0.0.1/", "file:///etc/passwd", [99999999], [-1],
]  # fmt: skip
ODD_BYTES = [b"\xff", b"\0", b"\\ud83d", b"{", b"}", b"[" * 500, b'"', b",", b"1e999", b"-", b"\xed\xa0\x80", b"NaN"]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def damaged(body: dict[str, Any], chance: random.Random) -> bytes:
    """The body with one to three things wrong: values of another kind, keys gone or new, bytes gone or new."""
    body = json.loads(json.dumps(body))
    for _ in range(chance.randint(0, 2)):
        container, key = chance.choice(list(_places(body)) or [(body, "model")])
        what = chance.randrange(4)
        if what == 0 and isinstance(container, dict):
            container.pop(key, None)
        elif what == 1 and isinstance(container, dict):
            container[chance.choice(["", "x", "\ud800", "stop", "tools", "n", "content"])] = chance.choice(ODD_VALUES)
        else:
            container[key] = chance.choice(ODD_VALUES)
    content = json.dumps(body).encode()
    if chance.random() < 0.4:
        at = chance.randrange(len(content) + 1)
        content = content[:at] + chance.choice(ODD_BYTES) + content[at + chance.choice([0, 1, 5]) :]
    return content[: chance.randrange(len(content) + 1)] if chance.random() < 0.1 else content


def test_damaged_requests(client: httpx.Client) -> None:
    chance = random.Random(0)
    outcomes: Counter[int] = Counter()
    for _ in range(8 * CASES):
        path, body = chance.choice(GOOD)
        content = damaged(body, chance)
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        outcomes[response.status_code] += 1
        check(path, response.status_code, response.content)
    assert outcomes[200] > CASES // 2  # some do not matter
    assert outcomes[400] > CASES // 2
    assert client.get("/health").json()["status"] == "ok"
