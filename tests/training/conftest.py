from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_npu.config import RunConfig
from support.small_run import skip_off_the_cpu, small_run, write_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_run(material: Path, tmp_path: Path, device: torch.device) -> Callable[..., RunConfig]:
    """Builds a small run on each device of this machine; keyword arguments change it, sections as dictionaries."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        return small_run(material, tmp_path / name, device.type, **changes)

    return make


@pytest.fixture
def once(device: torch.device, exhaustive: bool) -> None:
    """One device is enough: what is tested is the same on all of them."""
    if device.type != "cpu" and not exhaustive:
        skip_off_the_cpu()


class _NoPlotter:
    def __init__(self, folder: Path) -> None: ...
    def draw_if_due(self) -> None: ...


@pytest.fixture(autouse=True)
def _draw_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a small run; it is tested in test_plots.py."""
    if request.path.name != "test_plots.py":
        monkeypatch.setattr("llava_npu.training.monitoring.monitor.Plotter", _NoPlotter)
        monkeypatch.setattr("llava_npu.training.trainer.draw_plots", lambda folder: None)
