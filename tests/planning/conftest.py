from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.config import RunConfig
from support.small_run import small_run, write_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def make_run(material: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Builds a small run of two steps; keyword arguments change it, sections as dictionaries."""

    def make(**changes: Any) -> RunConfig:
        return small_run(material, tmp_path / "run", "cpu", **{"micro_batch_size": 4, "max_steps": 2, **changes})

    return make
