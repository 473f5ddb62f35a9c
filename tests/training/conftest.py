from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from llava_npu.config import RunConfig
from small_run import small_run


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny `lm`, `clip` and `train.json`, to be read only."""
    folder = tmp_path_factory.mktemp("material")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    tiny.write_captions(folder)
    tiny.write_records(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_run(material: Path, tmp_path: Path, device: torch.device) -> Callable[..., RunConfig]:
    """Builds a small run on each device of this machine; keyword arguments change it, sections as dictionaries."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        return small_run(material, tmp_path / name, device.type, **changes)

    return make
