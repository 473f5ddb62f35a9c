"""Every comparison in src/llava_npu/recipes/ is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.comparison.grid import expand
from llava_npu.config import load_as
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.evaluation.benchmarks import get

COMPARISONS = sorted((Path(__file__).parents[2] / "src" / "llava_npu" / "recipes").glob("compare-*.yaml"))


@pytest.mark.parametrize("recipe", COMPARISONS, ids=lambda path: path.stem)
def test_comparison_loads(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_npu.comparison.grid.data_fingerprint", lambda data: data.path)  # it is not here
    config = load_as(ComparisonConfig, recipe)
    assert config.output == f"runs/{recipe.stem}"
    trials = expand(config, recipe.name)
    seeds = config.seeds if isinstance(config.seeds, int) else len(config.seeds or [0])
    assert len(trials) == len(config.encoders) * len(config.projectors) * seeds
    assert all(get(benchmark.name) for benchmark in config.benchmarks)
