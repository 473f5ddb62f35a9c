"""Streams and events. Work is done when a call returns, so only their order of creation and their times are real."""

from __future__ import annotations

from typing import Any, Self

import torch

from torch_npu.npu.utils import DeviceLike, device_index


class Stream(torch.Stream):
    def __new__(cls, device: DeviceLike = None, priority: int = 0, **kwargs: Any) -> Self:
        if "stream_id" in kwargs:  # torch rebuilds a stream from its identity
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, device=torch.device("npu", device_index(device)), priority=priority)


class Event:
    """Makes a torch.Event of this device. Not a subclass: torch measures time between its own events only."""

    def __new__(  # type: ignore[misc]
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> torch.Event:
        return torch.Event("npu", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)


def current_stream(device: DeviceLike = None) -> torch.Stream:
    return torch.accelerator.current_stream(device_index(device))


def default_stream(device: DeviceLike = None) -> torch.Stream:
    index = device_index(device)
    return Stream(stream_id=0, device_index=index, device_type=torch._C._autograd.DeviceType.PrivateUse1.value)


def set_stream(stream: torch.Stream | None) -> None:
    if stream is not None:
        torch.accelerator.set_stream(stream)


class StreamContext:
    """Context manager that makes `stream`, and its device, current; None leaves everything as it is."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream
        self.previous: list[torch.Stream] = []

    def __enter__(self) -> None:
        if self.stream is not None:
            self.previous = [current_stream(self.stream.device), current_stream()]
            set_stream(self.stream)

    def __exit__(self, *exception: Any) -> None:
        for stream in self.previous:  # setting a stream also makes its device current: the old device comes last
            set_stream(stream)
        self.previous = []


def stream(stream: torch.Stream | None) -> StreamContext:
    return StreamContext(stream)
