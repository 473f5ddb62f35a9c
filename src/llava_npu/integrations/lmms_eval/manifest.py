"""What lmms-eval's registry is told."""

from __future__ import annotations

from typing import Any

_MODULE = "llava_npu.integrations.lmms_eval.model"


def manifest() -> Any:
    """The `ModelManifest` of our models; called by lmms-eval, through the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llava_npu",
        simple_class_path=f"{_MODULE}.LlavaNpu",
        chat_class_path=f"{_MODULE}.LlavaNpuChat",
        aliases=("llava-npu",),
    )
