"""Files that visitors upload: in a private folder, limited in total, removed with the page; no other file is opened.

Gradio lets a client name any path of this machine where it should name an upload of its own, and would then copy that
file to where it is served from. So every path that comes from a client is checked here.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_npu.errors import UserError

MAX_TOTAL_BYTES = 2**30
MAX_AGE_SECONDS = 3600
READ_SECONDS = 20.0  # without a byte of a body
BODY_SECONDS = 300.0  # for a whole one
_MAX_EVENT_BYTES = 4 * 2**20  # of a body that is not an upload: a question and the names of images
_GRADIO_FOLDER = "GRADIO_TEMP_DIR"


def make_upload_folder() -> Path:
    """A folder that only this user can read, and that is removed when the process ends; Gradio's from now on."""
    folder = Path(tempfile.mkdtemp(prefix="llava-npu-web-")).resolve()
    os.environ[_GRADIO_FOLDER] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_uploaded(files: Sequence[str], folder: Path) -> None:
    """
    Raises:
        UserError: a path that is not an uploaded file, links followed.
    """
    for file in files:
        try:
            path = Path(file).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            path = None
        if path is None or not path.is_file() or not path.is_relative_to(folder.resolve()):
            raise UserError("Images have to be uploaded here; upload this one again.")


class UploadLimit:
    """ASGI middleware: refuses uploads while the folder is full."""

    def __init__(self, app: ASGIApp, folder: Path, max_bytes: int):
        self._app = app
        self._folder = folder
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_upload(scope):
            length = dict(scope["headers"]).get(b"content-length", b"")
            more = int(length) if length.isdigit() else self._max_bytes  # of unknown length: none
            if self._used() + more > self._max_bytes:
                refusal = PlainTextResponse("The folder for uploads is full; try again later.", 413)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _used(self) -> int:
        total = 0
        for root, _, files in os.walk(self._folder):
            for name in files:
                try:
                    total += (Path(root) / name).lstat().st_size
                except FileNotFoundError:  # removed meanwhile
                    continue
        return total


class BodyLimit:
    """ASGI middleware: leaves clients whose bodies come too slowly or, but for uploads, are too large."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        end = time.monotonic() + BODY_SECONDS
        left = float("inf") if _is_upload(scope) else _MAX_EVENT_BYTES
        refusal: PlainTextResponse | None = None
        complete = started = False

        async def receive_some() -> Message:
            nonlocal complete, left, refusal
            if complete:  # what may still come is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout(min(READ_SECONDS, end - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                refusal = PlainTextResponse("The request did not come in time.", 408)
                return {"type": "http.disconnect"}
            complete = not message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                refusal = PlainTextResponse("The request is too large.", 413)
                return {"type": "http.disconnect"}
            return message

        async def send_unless_refused(message: Message) -> None:
            nonlocal started
            if refusal is None or started:
                started = True
                await send(message)

        try:
            await self._app(scope, receive_some, send_unless_refused)
        except Exception:  # a request that was cut off ends in whatever Gradio raises for it; it is refused below
            if refusal is None:
                raise
        if refusal is not None and not started:
            await refusal(scope, receive, send)


def _is_upload(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")
