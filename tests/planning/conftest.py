from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from llava_npu.config import RunConfig


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny `lm`, `clip`, `captions.json` and `train.json`, to be read only."""
    folder = tmp_path_factory.mktemp("material")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    tiny.write_captions(folder)
    tiny.write_records(folder)
    return folder


@pytest.fixture
def make_run(material: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Builds a small run; keyword arguments change it, sections as dictionaries."""

    def make(**changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "output": str(tmp_path / "run"),
            "stage": "finetune",
            "model": {"vision_tower": str(material / "clip"), "language_model": str(material / "lm")},
            "data": {"path": str(material / "train.json"), "workers": 0},
            "batch_size": 8,
            "micro_batch_size": 4,
            "max_steps": 2,
            "device": "cpu",
            "precision": "fp32",
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
        return RunConfig.model_validate(values)

    return make
