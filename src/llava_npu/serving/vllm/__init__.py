"""A plug-in for vLLM (entry point `vllm.general_plugins`): models whose projector vLLM does not know.

A model with the two-layer MLP needs none of this: its checkpoint is plain LLaVA, which vLLM has.

`make test-vllm` opens models of every projector in a real vLLM.
"""

from __future__ import annotations

ARCHITECTURE = "LlavaNpuForConditionalGeneration"


def register() -> None:
    """Tells vLLM of the model; its code is imported when such a model is loaded, in whichever process does."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "llava_npu.serving.vllm.model:VllmLlavaNpu")
