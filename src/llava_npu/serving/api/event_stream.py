"""A response that goes out chunk by chunk, and notices at once when nobody listens any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")


class ClientDisconnectedError(Exception):
    """The client closed its connection."""


async def cancel_on_disconnect(receive: Receive, work: Awaitable[_T]) -> _T:
    """Awaits `work`, and cancels it when the client leaves. The request's body must have been read.

    Raises:
        ClientDisconnectedError: the client closed its connection.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_leave(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _wait_for_leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ByteStreamResponse(Response):
    """Sends chunks as they come. A client that does not read them for `send_timeout` seconds is left."""

    def __init__(self, chunks: AsyncIterator[bytes], media_type: str, send_timeout: float):
        self._chunks = chunks
        self._send_timeout = send_timeout
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnectedError, TimeoutError, OSError):
            await cancel_on_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._chunks) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                await self._send(send, chunk, more=True)
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._send_timeout):
            await send({"type": "http.response.body", "body": body, "more_body": more})
