"""The page opens what was uploaded to it, and nothing else of the machine: asked by raw HTTP, as an attacker would."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from llava_npu.errors import UserError
from llava_npu.inference.engine import InferenceEngine
from llava_npu.models.loaded import LoadedModel
from llava_npu.serving.addresses import AllowedHosts
from llava_npu.serving.background import BackgroundEngine
from llava_npu.serving.web import uploads
from llava_npu.serving.web.conversation import ServedModel
from llava_npu.serving.web.page import build_page, page_app
from support.running import connect, http, running_app

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def page(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address and its folder of uploads."""
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (30, 20), "red").save(folder / "example.png")
    engine = InferenceEngine(loaded, max_batch=1, max_length=256)
    background = BackgroundEngine(engine)
    background.start()
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", "")
    patch.setattr(uploads, "MAX_TOTAL_BYTES", 10**6)
    blocks = build_page([ServedModel("tiny", engine, background)], folder / "flags", [folder / "example.png"])
    with running_app(page_app(blocks, AllowedHosts(), 2**20)) as address:
        yield address, Path(os.environ["GRADIO_TEMP_DIR"])
    background.stop()
    patch.undo()


@pytest.fixture
def private(tmp_path: Path) -> Path:
    path = tmp_path / "private.png"
    Image.new("RGB", (31, 17), (1, 2, 3)).save(path)
    return path


def call(address: str, inputs: int, data: list[object]) -> str:
    """All that the page says about one call of each event that takes so many inputs."""
    said = ""
    config = httpx.get(f"{address}/config", timeout=60).json()
    for number, dependency in enumerate(config["dependencies"]):
        if len(dependency["inputs"]) != inputs or not dependency["backend_fn"]:
            continue
        session = f"attacker{number}"
        body = {"data": data, "fn_index": dependency.get("id", number), "session_hash": session, "event_data": None}
        reply = httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=60)
        said += reply.text
        if reply.status_code != 200:
            continue
        with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as events:
            for line in events.iter_lines():
                said += line
                if "process_completed" in line or "close_stream" in line:
                    break
    return said


def copies(folder: Path, content: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.read_bytes() == content]


def attack(page: tuple[str, Path], path: str, meta: bool) -> str:
    address, _ = page
    file = {"path": path, **({"meta": {"_type": "gradio.FileData"}} if meta else {})}
    gallery = [{"image": file, "caption": None}]
    asked = call(address, 6, ["What is it?", gallery, None, 0.0, 1.0, 16])
    return asked + call(address, 2, [0, gallery])


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("kind", ["file", "hidden", "link", "link in uploads", "dots"])
def test_no_file_of_the_machine_is_handed_out(page: tuple[str, Path], private: Path, kind: str, meta: bool) -> None:
    _, folder = page
    path = private
    if kind == "hidden":
        path = private.rename(private.with_name(".private.png"))
    elif kind == "link":
        path = private.with_name("link.png")
        path.symlink_to(private)
    elif kind == "link in uploads":
        path = folder / "link.png"
        path.unlink(missing_ok=True)
        path.symlink_to(private)
    elif kind == "dots":
        path = folder / ".." / os.path.relpath(private, folder.parent)
    content = path.read_bytes()
    said = attack(page, str(path), meta)
    assert said
    if kind == "link in uploads":
        path.unlink()
    assert not copies(folder, content)
    assert "file=" not in said.replace("example.png", "") or str(folder) not in said


def test_an_upload_is_answered(page: tuple[str, Path], private: Path) -> None:
    address, folder = page
    reply = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", private.read_bytes())}, timeout=60)
    (path,) = reply.json()
    assert Path(path).is_relative_to(folder)
    said = attack(page, path, meta=True)
    assert "have to be uploaded" not in said
    assert json.dumps(path)[1:-1] in said


def test_uploads_are_private_and_limited(page: tuple[str, Path]) -> None:
    address, folder = page
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    big = b"x" * 900_000
    statuses = []
    for _ in range(1200):
        reply = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", big + os.urandom(9))}, timeout=60)
        statuses.append(reply.status_code)
        if reply.status_code == 413:
            break
    assert statuses[-1] == 413


@pytest.mark.parametrize("path", ["", "/", "/nowhere.png", "a\0b", "x" * 5000])
def test_what_is_not_an_uploaded_file(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="have to be uploaded"):
        uploads.check_uploaded([path], tmp_path)


def test_other_names_are_refused(page: tuple[str, Path]) -> None:
    """As after a name was rebound to this address (DNS rebinding), on every route and before anything is read."""
    address, _ = page
    port = address.rpartition(":")[2]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "192.168.0.7",
        "localhost@evil.example",
    ):
        for path in ("/", "/config", "/gradio_api/upload", "/gradio_api/queue/data?session_hash=x"):
            reply = http.get(f"{address}{path}", headers={"Host": host})
            assert (reply.status_code, "--allowed-hosts" in reply.text) == (403, True), (host, path)
    for host in ("localhost", f"LOCALHOST.:{port}", f"127.0.0.1:{port}", "127.1.2.3", f"[::1]:{port}"):
        assert http.get(f"{address}/config", headers={"Host": host}).status_code == 200, host
    with connect(address) as connection:  # without a name at all, as HTTP/1.0 allows
        connection.sendall(b"GET /config HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
def test_a_body_that_does_not_come(path: str, page: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "READ_SECONDS", 0.3)
    kind = "multipart/form-data; boundary=B" if path.endswith("upload") else "application/json"
    url = httpx.URL(page[0])
    with socket.create_connection((url.host, url.port or 80)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n--B"
        connection.sendall(head.encode())
        connection.settimeout(60)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_body_that_does_not_end(page: tuple[str, Path]) -> None:
    body = b'{"data": ["' + b"x" * 5 * 2**20
    reply = httpx.post(f"{page[0]}/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413
