"""Every recipe in configs/ is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.config import load_config

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.output == f"runs/{recipe.stem}"
    assert config.batch_size % config.micro_batch_size == 0
