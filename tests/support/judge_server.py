"""A local endpoint that speaks the chat protocol, as well or as badly as a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Responder = Callable[[dict[str, Any]], "str | tuple[int, str] | bytes"]


class JudgeServer:
    """Answers every request by a function of it: a reply's text, a status and a message, or a raw body."""

    def __init__(self, respond: Responder):
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        outer = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append({name.title(): value for name, value in self.headers.items()})
                    outer.paths.append(self.path)
                    answer = respond(body)
                if isinstance(answer, tuple):
                    self._send(answer[0], answer[1].encode())
                elif isinstance(answer, bytes):
                    self._send(200, answer)
                else:
                    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                    message = {"role": "assistant", "content": answer}
                    self._send(
                        200, json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage}).encode()
                    )

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Retry-After-Ms", "1")  # tests do not wait
                self.send_header("Content-Type", "application/json" if body.startswith(b"{") else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
