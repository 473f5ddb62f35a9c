"""LLaVA-NPU: LLaVA-style vision-language models on Ascend NPUs, CUDA GPUs and CPUs.

Importing this package does no work: the public names are loaded on first use, and the model classes join transformers'
`Auto*` registries when transformers itself is loaded (see `models/auto.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llava_npu.models.auto import register_when_transformers_loads
from llava_npu.version import __version__

_HOME = {
    "LlavaNpuConfig": "llava_npu.models.configuration",
    "LlavaNpuForConditionalGeneration": "llava_npu.models.modeling",
    "LlavaNpuProcessor": "llava_npu.models.processing",
    "LoadedModel": "llava_npu.models.loaded",
    "Sampling": "llava_npu.inference.request",
    "UserError": "llava_npu.errors",
    "answer_all": "llava_npu.inference.batch",
    "build_answerer": "llava_npu.evaluation.answering",
    "evaluate": "llava_npu.evaluation.run",
    "load": "llava_npu.models.loading",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llava_npu' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_transformers_loads()
