"""Training: what is trained (stages), how weights move (optimizer), the loop, checkpoints, metrics."""

from __future__ import annotations

from typing import Any

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from llava_npu.training.trainer import train

        return train
    raise AttributeError(f"module 'llava_npu.training' has no attribute {name!r}")
