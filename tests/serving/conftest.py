from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import tiny
from llava_npu.models import compose
from llava_npu.models.loaded import LoadedModel


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, to be read only. Its weights are large enough that every question has another answer."""
    folder = tmp_path_factory.mktemp("parts") / "serving"
    words = tiny.write_language_model(folder / "lm", tie_word_embeddings=False, initializer_range=0.3)
    model, processor = compose(str(tiny.write_clip(folder / "clip")), str(words))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    from llava_npu.models import load

    return load(model_folder, "cpu")


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (30, 20), colour) for colour in tiny.COLOURS.values()]
