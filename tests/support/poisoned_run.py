"""A run in which one step is not finite.

A model with such weights is refused when it is loaded. Here they stand for what becomes infinite in training, so
whoever trains this run does so under `without_check`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_npu.models import loading
from llava_npu.models.composing import compose
from llava_npu.models.loaded import LoadedModel
from support import tiny

_BAD = "~"  # a token that one record alone has


def poisoned_run(material: Path, folder: Path) -> dict[str, Any]:
    """Changes of a small run: its language model has no finite numbers for one token, which record 3 alone has."""
    tiny.write_language_model(folder / "lm", tie_word_embeddings=False)
    model, processor = compose(str(material / "clip"), str(folder / "lm"))
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[processor.tokenizer.convert_tokens_to_ids(_BAD)] = float("inf")
    LoadedModel(model, processor).save_pretrained(folder / "model")
    records = json.loads((material / "train.json").read_text())
    records[3]["conversations"][0]["value"] += _BAD
    (folder / "train.json").write_text(json.dumps(records))
    return {
        "parts": {"language_model": {"train": "frozen"}},  # whose weights are spoilt already
        "model": {"checkpoint": str(folder / "model"), "vision_tower": None, "language_model": None},
        "data": {"path": str(folder / "train.json"), "image_root": str(material)},
    }


@contextmanager
def without_check() -> Iterator[None]:
    """Weights that are not finite are loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "check_finite", lambda *_, **__: None)
        yield
