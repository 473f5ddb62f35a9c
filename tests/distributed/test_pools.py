"""Pools of processes."""

from __future__ import annotations

import os
import signal

import pytest

from llava_npu.distributed.pools import worker_pool
from llava_npu.errors import UserError


def _nothing() -> None: ...


def test_a_process_that_is_killed_is_one_error() -> None:
    with (
        pytest.raises(UserError, match="one of 1 processes that read the data was killed"),
        worker_pool(1, _nothing) as pool,
    ):
        pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL).result()
