from __future__ import annotations

from pathlib import Path

import pytest

from support import tiny


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny `lm`, `clip` and `siglip`, to be read only."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    tiny.write_siglip(folder / "siglip")
    return folder
