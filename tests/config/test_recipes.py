"""Every recipe in src/llava_npu/recipes/ is valid, says how to start it, and runs at debug size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llava_npu import UserError
from llava_npu.config import load_config
from llava_npu.config.recipes import find_recipe, find_writer, recipes
from llava_npu.models.projectors import available

RECIPES = recipes()
# Without `identity`, which needs a tower as wide as the language model.
PROJECTORS = [name.replace("{N}", "2") for name in available() if name != "identity"]
OFTEN_RUN = ("resampler", "dense_dci")


def test_configs_are_the_recipes() -> None:
    folder = Path(__file__).parents[2] / "src" / "llava_npu" / "recipes"
    assert {file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("compare-")} == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads(name: str) -> None:
    config = load_config(RECIPES[name])
    assert config.output == f"runs/{name}".replace("llava-npu-7b", "llava-npu-7b-mlp2x_gelu")
    assert config.batch_size % config.micro_batch_size == 0
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), RECIPES[name].open()))
    for start in ("1 device: ", "8 devices: ", "2 nodes: ", "debug size: "):
        command = next(line for line in head.splitlines() if start in line)
        assert f"train {name}" in command, f"{start} should say how"


@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_projector_has_a_run_folder_of_its_own(projector: str) -> None:
    override = [f"model.projector={projector}"]
    align, finetune = (load_config(RECIPES[f"llava-npu-7b-{stage}"], override) for stage in ("align", "finetune"))
    assert align.output == f"runs/llava-npu-7b-{projector}-align"
    assert finetune.output == f"runs/llava-npu-7b-{projector}-finetune"
    assert finetune.model.checkpoint == align.output
    assert finetune.model.explicit_keys == {"projector": projector}  # a checkpoint with another one is refused
    writer = find_writer(align.output, projector=projector)
    assert writer is not None
    assert (writer.path, writer.run) == (RECIPES["llava-npu-7b-align"], align)


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
    with pytest.raises(UserError, match=r"nor the name of a recipe. Did you mean 'llava-v1.5-7b-align'\?"):
        find_recipe("llava-v1.5-7b-alighn")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage_two", "projector"),
    [
        ("llava-v1.5-7b", ["llava-v1.5-7b-finetune", "llava-v1.5-7b-lora"], "mlp2x_gelu"),
        *(
            pytest.param(
                *("llava-npu-7b", ["llava-npu-7b-finetune"], projector),
                marks=[] if projector in OFTEN_RUN else pytest.mark.exhaustive,
            )
            for projector in PROJECTORS
        ),
    ],
)
def test_recipes_run_at_debug_size(
    recipe: str,
    stage_two: list[str],
    projector: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stage 1 and all that start from it."""
    from llava_npu.debug_size.assets import prepare
    from llava_npu.debug_size.config import load_at_debug_size
    from llava_npu.models import load
    from llava_npu.planning.check import choose_recomputation
    from llava_npu.training import train
    from llava_npu.training.monitoring.metrics import read_metrics
    from llava_npu.training.resolve import ResolvedRun

    monkeypatch.chdir(tmp_path_factory.getbasetemp())  # all share the tiny models
    overrides = [] if recipe == "llava-v1.5-7b" else [f"model.projector={projector}"]
    for each in [f"{recipe}-align", *stage_two]:
        run = load_at_debug_size(RECIPES[each], ["device=cpu", "precision=fp32", *overrides])
        prepare(run)
        train(choose_recomputation(ResolvedRun(run), 1))
        assert len(read_metrics(run.output_path)) == 2
    model, _ = load(run.output_path)
    assert model.config.projector_type == projector


def test_a_stage_whose_first_did_not_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_npu.debug_size.assets import prepare
    from llava_npu.debug_size.config import load_at_debug_size

    monkeypatch.chdir(tmp_path)
    for override, command in (
        ([], "llava-npu-7b-align --debug-size"),
        (["model.projector=ldpv2"], "llava-npu-7b-align model.projector=ldpv2 --debug-size"),
    ):
        with pytest.raises(UserError, match=f"First: llava-npu train {command}"):
            prepare(load_at_debug_size(RECIPES["llava-npu-7b-finetune"], override))
