"""Shapes of published models, so that their recipes can be planned without a download.

Each entry is what the publisher's own file says; where a folder or a hub's cache has the file, that is read instead.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, Dinov2WithRegistersConfig, LlamaConfig, PreTrainedConfig, SiglipVisionConfig

# By hub id, in lower case.
_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
# By hub id, in lower case: config.json of that model, of a whole CLIP or SigLIP its vision half.
_MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    # Radford et al. 2021, arXiv:2103.00020
    "openai/clip-vit-large-patch14-336": (CLIPVisionConfig, {**_LARGE, "intermediate_size": 4096, "image_size": 336}),
    # Zhai et al. 2023; the shape is that of Alabdulmohsin et al. 2023, arXiv:2305.13035
    "google/siglip-so400m-patch14-384": (
        SiglipVisionConfig,
        {**_LARGE, "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384},
    ),
    # Darcet et al. 2024, arXiv:2309.16588; at the size of its image processor
    "facebook/dinov2-with-registers-large": (Dinov2WithRegistersConfig, {**_LARGE, "image_size": 224}),
    # Llama-2-7B and -13B (Touvron et al. 2023, arXiv:2307.09288)
    "lmsys/vicuna-7b-v1.5": (LlamaConfig, {**_LLAMA_2, **_7B}),
    "lmsys/vicuna-13b-v1.5": (LlamaConfig, {**_LLAMA_2, **_13B}),
}


def published_model(hub_id: str) -> Any | None:
    """The configuration of a model of the table; None for any other."""
    if (known := _MODELS.get(hub_id.lower())) is None:
        return None
    kind, values = known
    return kind(**values)


def published_models() -> list[str]:
    """The hub ids of the table."""
    return list(_MODELS)
