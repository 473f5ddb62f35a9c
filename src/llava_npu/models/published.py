"""Shapes of published models, so that their recipes can be planned without a download.

Each entry is what the publisher's own file says; where a folder or a hub's cache has the file, that is read instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig, Dinov2WithRegistersConfig, LlamaConfig, SiglipVisionConfig

_VICUNA = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def _clip_large_336() -> Any:
    """config.json of huggingface.co/openai/clip-vit-large-patch14-336, its vision half (Radford et al. 2021)."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def _siglip_so400m_384() -> Any:
    """config.json of huggingface.co/google/siglip-so400m-patch14-384, its vision half (Zhai et al. 2023; the shape is
    that of Alabdulmohsin et al. 2023, arXiv:2305.13035).
    """
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )


def _dinov2_large_registers() -> Any:
    """config.json of huggingface.co/facebook/dinov2-with-registers-large (Darcet et al. 2024, arXiv:2309.16588), at the
    size of its image processor.
    """
    return Dinov2WithRegistersConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )


def _vicuna_7b() -> Any:
    """config.json of huggingface.co/lmsys/vicuna-7b-v1.5: Llama-2-7B (Touvron et al. 2023, arXiv:2307.09288)."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, **_VICUNA
    )


def _vicuna_13b() -> Any:
    """config.json of huggingface.co/lmsys/vicuna-13b-v1.5: Llama-2-13B."""
    return LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, **_VICUNA
    )


# By hub id, in lower case.
_MODELS: dict[str, Callable[[], Any]] = {
    "openai/clip-vit-large-patch14-336": _clip_large_336,
    "google/siglip-so400m-patch14-384": _siglip_so400m_384,
    "facebook/dinov2-with-registers-large": _dinov2_large_registers,
    "lmsys/vicuna-7b-v1.5": _vicuna_7b,
    "lmsys/vicuna-13b-v1.5": _vicuna_13b,
}


def published_model(hub_id: str) -> Any | None:
    """The configuration of a model of the table; None for any other."""
    make = _MODELS.get(hub_id.lower())
    return make() if make else None


def published_models() -> list[str]:
    """The hub ids of the table."""
    return list(_MODELS)
