"""What exactly answered: checksums of a model's weights, and of everything that prepares its input."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch

from llava_npu.models.processing import LlavaNpuProcessor


def fingerprint_model(model: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights and the configuration: "sha256:…"."""
    digest = hashlib.sha256()
    digest.update(json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def fingerprint_processor(processor: LlavaNpuProcessor) -> str:
    """SHA-256 over the tokenizer's vocabulary, the templates, and the image processor's settings: "sha256:…"."""
    facts = {
        "vocabulary": sorted(processor.tokenizer.get_vocab().items()),
        "template": processor.template,
        "chat_template": getattr(processor.tokenizer, "chat_template", None),
        "num_image_tokens": processor.num_image_tokens,
        "image_aspect_ratio": processor.image_aspect_ratio,
        **({"tiling": asdict(processor.tiling)} if processor.tiling is not None else {}),
        "image_processor": _stable(processor.image_processor.to_dict()),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _stable(values: dict[str, Any]) -> dict[str, Any]:
    """Without what a library writes about itself, or where a model was loaded from: no answer depends on it."""
    ignored = ("transformers_version", "_name_or_path", "dtype", "_attn_implementation", "image_processor_type")
    return {
        key: _stable(value) if isinstance(value, dict) else value for key, value in values.items() if key not in ignored
    }
