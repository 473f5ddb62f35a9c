from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from llava_npu.config import RunConfig


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
        finetune = changes.get("stage", "finetune") == "finetune"
        values: dict[str, Any] = {
            "output": str(tmp_path / name),
            "stage": "finetune",
            "model": {"vision_tower": str(material / "clip"), "language_model": str(material / "lm")},
            "data": {"path": str(material / ("train.json" if finetune else "captions.json")), "workers": 0},
            "optimizer": {"learning_rate": 2e-3},
            "batch_size": 8,
            "micro_batch_size": 8,
            "max_steps": 6,
            "epochs": 4,
            "device": device.type,
            "precision": "fp32",
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
        return RunConfig.model_validate(values)

    return make
