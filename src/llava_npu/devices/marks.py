"""Points in a device's queue of work: whether it has come to one, and when it did."""

from __future__ import annotations

import time
from typing import Any, Protocol, Self


class Mark(Protocol):
    """A point behind the work that a device had been given by then."""

    def reached(self) -> bool:
        """Whether that work is done; does not wait."""

    def wait(self) -> None:
        """Waits until it is."""

    def seconds_since(self, earlier: Self) -> float:
        """From the one point to the other, once both are reached."""


class HostMark:
    """Of a device whose work is done when a call returns."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def reached(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: HostMark) -> float:
        return self._time - earlier._time


class QueueMark:
    """Of a device that works through a queue while the host continues.

    Args:
        event: of the device's own kind, which measures time.
    """

    def __init__(self, event: Any) -> None:
        self._event = event
        event.record()

    def reached(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: QueueMark) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1000
