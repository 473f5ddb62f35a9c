"""The engine in a thread of its own, for servers: requests come from any thread, deltas go back as they are made."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable

from llava_npu.inference.engine import InferenceEngine
from llava_npu.inference.request import Delta, Request

Deliver = Callable[[Delta], None]


class EngineStoppedError(RuntimeError):
    """The engine takes no more requests."""


class BackgroundEngine:
    """Owns an engine. Nothing else may use it meanwhile.

    Attributes:
        failure: what ended the thread before its time, if anything did.
    """

    def __init__(self, engine: InferenceEngine, after_step: Callable[[InferenceEngine], None] = lambda engine: None):
        """`after_step`: told of the engine after each of its steps, in its thread."""
        self._engine = engine
        self._after_step = after_step
        self._inbox: queue.SimpleQueue[tuple[Request, Deliver] | None] = queue.SimpleQueue()
        self._deliver: dict[Request, Deliver] = {}
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

    def submit(self, request: Request, deliver: Deliver) -> None:
        """
        Args:
            request: what is asked; checked by `InferenceEngine.check` before.
            deliver: gets every delta, in the engine's thread, the last one with its finish reason.

        Raises:
            EngineStoppedError: nobody would answer.
        """
        if not self.is_alive:
            raise EngineStoppedError("the engine has stopped") from self.failure
        self._inbox.put((request, deliver))

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The deltas of an answer in an event loop. Whoever leaves early cancels it."""
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta] = asyncio.Queue()

        def deliver(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is there any more
                loop.call_soon_threadsafe(deltas.put_nowait, delta)

        self.submit(request, deliver)
        try:
            while True:
                delta = await deltas.get()
                yield delta
                if delta.finish_reason:
                    return
        finally:
            request.cancel()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_requests()
                for request, delta in self._engine.step():
                    self._give(request, delta)
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
                entry = self._inbox.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if entry is None:
                return
            request, deliver = entry
            self._deliver[request] = deliver
            self._engine.submit(request)

    def _give(self, request: Request, delta: Delta) -> None:
        deliver = self._deliver.pop(request) if delta.finish_reason else self._deliver[request]
        deliver(delta)

    def _end(self, reason: str, error: BaseException | None) -> None:
        while not self._inbox.empty():
            if (entry := self._inbox.get()) is not None:
                self._deliver[entry[0]] = entry[1]
        for deliver in self._deliver.values():
            deliver(Delta("", 0, "error" if reason == "error" else "cancelled", error))
        self._deliver.clear()
