"""Processes that share out work on the host's cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from llava_npu.distributed.launched import worker_dies_with_parent
from llava_npu.errors import UserError


@contextmanager
def worker_pool(workers: int, start: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """`workers` processes, each of which begins with `start(*arguments)`; they end with this one.

    Raises:
        UserError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(start, *arguments)) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} processes that read the data was killed, as happens where the machine runs out of "
            "memory. Free some, or let this process use fewer cores (taskset -c 0,1 llava-npu …), and start again."
        ) from error


def _start(start: Callable[..., None], *arguments: Any) -> None:
    worker_dies_with_parent()
    start(*arguments)
