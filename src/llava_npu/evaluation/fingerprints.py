"""What exactly answered, and about which images: checksums that make a run's identity.

Model and processor: their weights, and everything that prepares their input.

Image files: the question file's checksum covers images that it carries; those next to it could change unseen, and
reading all of them again would cost gigabytes at every start. Size, first and last kilobytes tell as much: an encoded
image that was replaced, resized or saved again differs in length or at its ends (a PNG ends with a checksum of its
pixels). Time stamps do not count, so that data which was copied or unpacked again is the same data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.data.image_sources import ImageFile, ImageSource

if TYPE_CHECKING:
    from llava_npu.models.processing import LlavaNpuProcessor

_END = 4096  # bytes
_DIGITS = 16  # hexadecimal; they tell files apart and defend against nobody


def fingerprint_images(images: Sequence[ImageSource]) -> str | None:
    """One short fingerprint of the image files of a question, missing ones included; None if it has none."""
    files = [image for image in images if isinstance(image, ImageFile)]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(_sample(file))
    return digest.hexdigest()[:_DIGITS]


def fingerprint_all(images: Mapping[str, str | None]) -> str | None:
    """One fingerprint of what `fingerprint_images` gave for each question, by its id; None if there are no files."""
    lines = [f"{name}\t{fingerprint}\n" for name, fingerprint in sorted(images.items()) if fingerprint is not None]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:_DIGITS] if lines else None


def _sample(image: ImageFile) -> bytes:
    try:
        if not isinstance(image.path, Path):  # in an archive: it cannot be read from its end
            return hashlib.sha256(image.path.read_bytes()).digest()
        with image.path.open("rb") as file:
            start = file.read(_END)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(len(start), size - _END))
            return b"%d\n" % size + hashlib.sha256(start + file.read(_END)).digest()
    except OSError:
        return b"unreadable"


def fingerprint_model(model: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights and the configuration: "sha256:…"."""
    import torch  # only here: reports are compared without it

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
