"""A run that ends in the middle, as by a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_npu.config import RunConfig
from llava_npu.training import train
from llava_npu.training.monitoring import monitor


class _CrashError(Exception):
    pass


def crash_after(run: RunConfig, step: int) -> None:
    """Trains until `step` is reported, then stops as a crash would."""
    append = monitor.append_metrics

    def crash(folder: Path, metrics: Any) -> None:
        append(folder, metrics)
        if metrics.step == step:
            raise _CrashError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "append_metrics", crash)
        with pytest.raises(_CrashError):
            train(run)
