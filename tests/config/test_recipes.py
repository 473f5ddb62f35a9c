"""Every recipe in src/llava_npu/recipes/ is valid, says how to start it, and runs at debug size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llava_npu import UserError
from llava_npu.config import load_config
from llava_npu.config.recipes import find_recipe, recipes
from llava_npu.models.projectors import available
from llava_npu.models.projectors.registry import registered_name

RECIPES = recipes()
ALIGN = [name for name in RECIPES if name.endswith("-align")]


def test_configs_are_the_recipes() -> None:
    folder = Path(__file__).parents[2] / "src" / "llava_npu" / "recipes"
    assert {file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("compare-")} == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads(name: str) -> None:
    config = load_config(RECIPES[name])
    assert config.output == f"runs/{name}"
    assert config.batch_size % config.micro_batch_size == 0
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), RECIPES[name].open()))
    for start in ("1 device: ", "8 devices: ", "2 nodes: ", "debug size: "):
        command = next(line for line in head.splitlines() if start in line)
        assert f"train {name}" in command, f"{start} should say how"


def test_every_projector_has_its_recipe() -> None:
    chosen = {registered_name(load_config(RECIPES[name]).model.projector) for name in ALIGN}
    assert chosen == set(available()) - {"identity"}  # which needs a tower as wide as the language model


def test_the_published_numbers() -> None:
    """Source: the official scripts (scripts/v1_5) and the README of LLaVA-NPU of 2024."""
    expected = {
        "llava-v1.5-7b-align": (256, 1e-3, "full", "frozen"),
        "llava-v1.5-7b-finetune": (128, 2e-5, "full", "full"),
        "llava-v1.5-7b-lora": (128, 2e-4, "full", "lora"),
        "llava-npu-7b-align": (256, 1e-3, "full", "frozen"),
        "llava-npu-7b-finetune": (64, 1e-5, "full", "full"),
    }
    for name, (batch_size, learning_rate, projector, language_model) in expected.items():
        config = load_config(RECIPES[name])
        parts = config.resolved_parts
        assert (config.batch_size, config.optimizer.learning_rate) == (batch_size, learning_rate)
        assert (parts["projector"].train, parts["language_model"].train) == (projector, language_model)
        assert parts["vision_tower"].train == "frozen"
        assert (config.epochs, config.data.max_length, config.optimizer.weight_decay) == (1, 2048, 0.0)
        assert config.optimizer.warmup_ratio == 0.03
    lora = load_config(RECIPES["llava-v1.5-7b-lora"])
    assert (lora.lora.rank, lora.lora.alpha, lora.lora.dropout) == (128, 256, 0.05)
    assert lora.resolved_parts["projector"].learning_rate == 2e-5


def test_a_recipe_is_found_by_name_or_path() -> None:
    assert find_recipe("llava-v1.5-7b-align") == RECIPES["llava-v1.5-7b-align"]
    assert find_recipe("elsewhere/my.yaml") == Path("elsewhere/my.yaml")
    with pytest.raises(UserError, match=r"no recipe of that name. Did you mean 'llava-v1.5-7b-align'\?"):
        find_recipe("llava-v1.5-7b-alighn")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIGN)
def test_recipes_run_at_debug_size(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 and all that go on from it."""
    from llava_npu.debug_size.assets import prepare
    from llava_npu.debug_size.config import load_at_debug_size
    from llava_npu.models import load
    from llava_npu.training import train
    from llava_npu.training.monitoring.metrics import read_metrics

    monkeypatch.chdir(tmp_path_factory.getbasetemp())  # all share the tiny models
    following = [each for each in RECIPES if load_config(RECIPES[each]).model.checkpoint == f"runs/{name}"]
    assert following
    for each in [name, *following]:
        run = load_at_debug_size(RECIPES[each], ["device=cpu", "precision=fp32"])
        prepare(run)
        train(run)
        assert len(read_metrics(run.output_path)) == 2
    model, _ = load(run.output_path)
    assert model.config.projector_type == load_config(RECIPES[name]).model.projector


def test_a_stage_whose_first_did_not_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_npu.debug_size.assets import prepare
    from llava_npu.debug_size.config import load_at_debug_size

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="First: llava-npu train llava-npu-7b-align --debug-size"):
        prepare(load_at_debug_size(RECIPES["llava-npu-7b-finetune"]))
