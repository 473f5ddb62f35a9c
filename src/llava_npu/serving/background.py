"""The engine in a thread of its own, for servers: requests come from any thread, pieces go back as they are made."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable

from llava_npu.inference.engine import Engine
from llava_npu.inference.request import Piece, Ticket

Deliver = Callable[[Piece], None]


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests."""


class BackgroundEngine:
    """Owns an engine. Nothing else may use it meanwhile.

    Attributes:
        failure: what ended the thread before its time, if anything did.
    """

    def __init__(self, engine: Engine, after_step: Callable[[Engine], None] = lambda engine: None):
        """`after_step`: told of the engine after each of its steps, in its thread."""
        self._engine = engine
        self._after_step = after_step
        self._inbox: queue.SimpleQueue[tuple[Ticket, Deliver] | None] = queue.SimpleQueue()
        self._deliver: dict[Ticket, Deliver] = {}
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; answers in the making are cancelled."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, ticket: Ticket, deliver: Deliver) -> None:
        """
        Args:
            ticket: what is asked; checked by `Engine.check` before.
            deliver: gets every piece, in the engine's thread, the last one with its finish reason.

        Raises:
            EngineStoppedError: nobody would answer.
        """
        if not self.is_alive:
            raise EngineStoppedError("the engine has stopped") from self.failure
        self._inbox.put((ticket, deliver))

    async def stream(self, ticket: Ticket) -> AsyncIterator[Piece]:
        """The pieces of an answer in an event loop. Whoever leaves early cancels it."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece] = asyncio.Queue()

        def deliver(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is there any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self.submit(ticket, deliver)
        try:
            while True:
                piece = await pieces.get()
                yield piece
                if piece.finish_reason:
                    return
        finally:
            ticket.cancel()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_requests()
                for ticket, piece in self._engine.step():
                    self._give(ticket, piece)
                self._after_step(self._engine)
            self._end("cancelled", None)
        except BaseException as error:  # noqa: BLE001  whoever waits must hear of it
            self.failure = error
            self._stopping = True
            self._end("error", error)

    def _take_requests(self) -> None:
        """Waits for one if there is nothing to do."""
        idle = not (self._engine.num_running or self._engine.num_waiting)
        while True:
            try:
                request = self._inbox.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if request is None:
                return
            ticket, deliver = request
            self._deliver[ticket] = deliver
            self._engine.submit(ticket)

    def _give(self, ticket: Ticket, piece: Piece) -> None:
        deliver = self._deliver.pop(ticket) if piece.finish_reason else self._deliver[ticket]
        deliver(piece)

    def _end(self, reason: str, error: BaseException | None) -> None:
        while not self._inbox.empty():
            if (request := self._inbox.get()) is not None:
                self._deliver[request[0]] = request[1]
        for deliver in self._deliver.values():
            deliver(Piece("", 0, "error" if reason == "error" else "cancelled", error))
        self._deliver.clear()
