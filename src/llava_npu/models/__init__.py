"""The model: configuration, vision towers, projectors, processor, composing from parts and loading from a folder."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "LlavaNpuConfig": "llava_npu.models.configuration",
    "LlavaNpuForConditionalGeneration": "llava_npu.models.modeling",
    "LlavaNpuProcessor": "llava_npu.models.processing",
    "LoadedModel": "llava_npu.models.loaded",
    "compose": "llava_npu.models.composing",
    "load": "llava_npu.models.loading",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Lazy, so that `llava_npu.models.projectors` can be imported without loading transformers.
    if name not in _HOME:
        raise AttributeError(f"module 'llava_npu.models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
