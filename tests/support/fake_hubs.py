"""Two hubs on this machine: what the Hugging Face hub and ModelScope answer, over HTTP, for folders of files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A server of both kinds.

    Attributes:
        models: name → revision → folder.
        requests: the paths that were asked for.
        cut: file names of which only the first half is sent, once.
        wrong: file names of which other bytes than listed are sent.
    """

    models: dict[str, dict[str, Path]]
    requests: list[str] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    url: str = ""

    def folder(self, name: str, revision: str) -> Path | None:
        revisions = self.models.get(name, {})
        return next(iter(revisions.values())) if revisions and revision == COMMIT else revisions.get(revision)


@contextmanager
def serving(models: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    hub = Hub(models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(self.path)
            _answer(hub, self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    parts = urlsplit(request.path)
    path, query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query).items()}
    if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
        _modelscope_list(hub, request, match[1], query["Revision"])
    elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
        folder = hub.folder(match[1], query["Revision"])
        _send_file(hub, request, folder / query["FilePath"] if folder else None)
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
        _huggingface_info(hub, request, match[1], match[2] or "main")
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
        _huggingface_tree(hub, request, match[1], match[2])
    elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
        folder = hub.folder(match[1], match[2])
        _send_file(hub, request, folder / match[3] if folder else None)
    else:
        _send(request, 404, b"{}")


def _modelscope_list(hub: Hub, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
    folder = hub.folder(name, revision)
    if folder is None:
        _send(request, 404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())
        return
    files = [
        {
            "Path": path.relative_to(folder).as_posix(),
            "Name": path.name,
            "Type": "tree" if path.is_dir() else "blob",
            "Size": 0 if path.is_dir() else path.stat().st_size,
            "Sha256": "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
    ]
    _send(request, 200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode())


def _huggingface_info(hub: Hub, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
    if name not in hub.models:
        _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return
    folder = hub.folder(name, revision)
    if folder is None:
        _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return
    siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in folder.rglob("*") if path.is_file()]
    _send(request, 200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())


def _huggingface_tree(hub: Hub, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
    folder = hub.folder(name, revision)
    if folder is None:
        _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound" if name in hub.models else "RepoNotFound"})
        return
    entries = [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file()
    ]
    _send(request, 200, json.dumps(entries).encode())


def _send_file(hub: Hub, request: BaseHTTPRequestHandler, path: Path | None) -> None:
    if path is None or not path.is_file():
        _send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return
    data = path.read_bytes()
    etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
    if path.name in hub.wrong:
        data = bytes(len(data))
    start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", request.headers.get("Range") or "")) else 0
    body = data[start:]
    if path.name in hub.cut and request.command == "GET":
        hub.cut.discard(path.name)
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2])
        request.close_connection = True
        return
    if start:
        etag["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    _send(request, 206 if start else 200, body, etag)


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
