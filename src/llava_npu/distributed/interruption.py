"""Being asked to stop: SIGTERM (a scheduler, a launcher) or SIGINT (Ctrl-C) end a run after the step it is in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# As sysexits.h has it: "temporary failure, the user is invited to retry".
EXIT_STATUS = 75


class RunStopped(Exception):  # noqa: N818  not an error: all is saved, and the same command resumes
    """A run saved its state and left, because it was asked to."""


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def stop_on_signal(report: Callable[[str], None]) -> Iterator[StopRequest]:
    """Notes the first signal; a second one acts at once, as it would without this.

    Outside the main thread, where Python lets nobody watch for signals, there is never a request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        request.made = True
        for each, handler in before.items():
            signal.signal(each, handler)
        report(f"{signal.Signals(number).name}: saving after this step, then leaving; once more to leave at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
