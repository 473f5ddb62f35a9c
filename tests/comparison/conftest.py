from __future__ import annotations

from pathlib import Path

import pytest

from support.comparison_samples import write_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights, captions and questions, to be read only."""
    return write_material(tmp_path_factory.mktemp("material"))
