"""Every recipe of a training run in configs/ is valid. (Comparisons: tests/comparison/test_grid.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.config import load_config

CONFIGS = (Path(__file__).parents[2] / "configs").glob("*.yaml")
RECIPES = sorted(path for path in CONFIGS if not path.stem.startswith("compare-"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.output == f"runs/{recipe.stem}"
    assert config.batch_size % config.micro_batch_size == 0
