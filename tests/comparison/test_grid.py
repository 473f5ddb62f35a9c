"""A grid's trials: which there are, by what they are known, and what is wrong with a configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_npu.comparison.folder import Measured
from llava_npu.comparison.grid import Trial, expand
from llava_npu.config import set_key, validate
from llava_npu.config.comparison import BenchmarkConfig, ComparisonConfig
from llava_npu.errors import UserError
from support.comparison_samples import values


def trials(material: Path, output: Path, **changes: Any) -> list[Trial]:
    return expand(validate(ComparisonConfig, values(material, output, **changes), "grid.yaml"), "grid.yaml")


def test_every_encoder_meets_every_projector_for_every_value(material: Path, tmp_path: Path) -> None:
    found = trials(
        material,
        tmp_path,
        encoders=[
            str(material / "clip"),
            {"name": "again", "vision_tower": str(material / "clip"), "image_aspect_ratio": "square"},
        ],
        projectors=["linear", {"type": "resampler", "num_queries": 4}],
        vary={"align.optimizer.learning_rate": [1e-3, 2e-3], "seed": [0, 1]},
    )
    assert len(found) == len({trial.folder for trial in found}) == 2 * 2 * 4
    assert found[0].name == "clip · linear · learning_rate=0.001 · seed=0"
    assert found[-1].name == "again · resampler (num_queries=4) · learning_rate=0.002 · seed=1"
    last = found[-1].align
    assert (last.seed, last.optimizer.learning_rate, last.stage) == (1, 2e-3, "align")
    assert last.model.projector_options == {"num_queries": 4}
    assert last.model.image_aspect_ratio == "square"
    assert last.data.cache_features == "auto"


def test_an_encoder_can_be_two_towers(material: Path, tmp_path: Path) -> None:
    two = {"vision_tower": [str(material / "clip")] * 2, "tower_fusion": "interleave"}
    (trial,) = trials(material, tmp_path, encoders=[two])
    assert trial.encoder == "clip + clip"
    assert trial.align.model.vision_towers == two["vision_tower"]


def test_the_second_stage_goes_on_from_the_trial_s_own_first(material: Path, tmp_path: Path) -> None:
    finetune = {"data": {"path": str(material / "train.json")}, "batch_size": 4}
    (trial,) = trials(material, tmp_path, finetune=finetune)
    assert trial.finetune is not None
    assert trial.finetune.model.checkpoint == trial.align.output
    assert Path(trial.finetune.output).parent == trial.folder
    assert trial.last is trial.finetune


def test_a_trial_is_known_by_what_its_model_depends_on(material: Path, tmp_path: Path) -> None:
    """Names, folders, devices and speed change nothing; data, options and seeds do."""
    data = tmp_path / "captions.json"
    data.write_text((material / "captions.json").read_text())
    align = values(material, tmp_path)["align"]

    def folder(**changes: Any) -> str:
        (trial,) = trials(material, tmp_path / "out", **{"align": {**align, "data": {"path": str(data)}}, **changes})
        return trial.folder.name[-8:]

    same = folder()
    assert folder(projectors=[{"type": "mlp2x_gelu", "name": "baseline"}], title="another", devices=["cpu"]) == same
    assert folder(align={**align, "data": {"path": str(data), "workers": 3}, "log_every": 5}) == same
    assert folder(vary={"seed": [0]}) == same
    assert folder(seed=1) != same
    assert folder(align={**align, "data": {"path": str(data)}, "max_steps": 3}) != same
    records = json.loads(data.read_text())
    data.write_text(json.dumps(records[:-1]))
    assert folder() != same


def test_a_renamed_trial_keeps_its_folder(material: Path, tmp_path: Path) -> None:
    (before,) = trials(material, tmp_path)
    before.folder.mkdir(parents=True)
    (after,) = trials(material, tmp_path, projectors=[{"type": "mlp2x_gelu", "name": "baseline"}])
    assert after.folder == before.folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projectors": ["mlp2x_gelu", "resampller"]},
            r"grid.yaml: projectors\[1\]: Unknown .* Did you mean 'resampler'\? Ava",
        ),
        ({"projectors": [{"type": "resampler", "queries": 4}]}, "no option 'queries'. Did you mean 'num_queries'"),
        ({"projectors": [{"num_queries": 4}]}, r"projectors\[0\]: `type` is missing"),
        ({"projectors": ["linear", "linear"]}, "'linear' appears twice; give each a `name`"),
        ({"projectors": [{"type": "linear", "name": "a"}, {"type": "linear", "name": "b"}]}, "are the same run"),
        ({"projectors": []}, "at least 1 item"),
        ({"encoders": [{"vision_towers": "x"}]}, r"encoders\[0\]: `vision_tower` is missing"),
        ({"encoders": [{"vision_tower": "x", "projector": "linear"}]}, "`projector` is not a key of an encoder"),
        ({"encoders": [{"vision_tower": "x", "vision_feature_layers": -1}]}, "Did you mean 'vision_feature_layer'"),
        ({"vary": {"align.optimizer.learning_rat": [1]}}, "Did you mean 'learning_rate'"),
        ({"vary": {"projectors": [["linear"]]}}, "`projectors` cannot vary; what can is in language_model, align"),
        ({"vary": {"seed": []}}, "seed has no values"),
        ({"vary": {"seeds": [1]}}, "`seeds` cannot vary"),
        ({"align": {"data": {"path": "absent.json"}}}, "absent.json"),
        ({"align": {"output": "x"}}, "`align.output` is set by the comparison"),
        ({"align": {"model": {"projector": "linear"}}}, "`align.model.projector` is set by the grid; remove it"),
        (
            {"finetune": {"model": {"scales": [1, 2]}}},
            "`finetune.model.scales`: stage 2 starts from the stage-1 checkpoint",
        ),
        ({"projektors": []}, "unknown key `projektors`. Did you mean 'projectors'"),
    ],
)
def test_mistakes_are_named(material: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trials(material, tmp_path, **changes)


def test_what_changes_no_result_makes_no_other_trial(material: Path, tmp_path: Path) -> None:
    llama = shutil.copytree(material / "lm", tmp_path / "llama")

    def folder(key: str = "seed", value: Any = 0) -> str:
        changed = values(material, tmp_path / "out", language_model=str(llama))
        set_key(changed, key, value, "test")
        (trial,) = expand(validate(ComparisonConfig, changed, "grid.yaml"), "grid.yaml")
        return trial.folder.name

    before = folder()
    for key, value in (
        ("micro_batch_size", 1),
        ("gradient_checkpointing", True),
        ("engine", "fsdp2"),
        ("trackers", ["tensorboard"]),
        ("max_nonfinite_steps", 9),
        ("data.workers", 3),
        ("data.cache_features", False),
    ):
        assert folder(f"align.{key}", value) == before, key
    for key, value in (("batch_size", 2), ("data.max_length", 100), ("optimizer.weight_decay", 0.5)):
        assert folder(f"align.{key}", value) != before, key
    weights = next(llama.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert folder() != before, "other weights under the same name"


def test_a_result_holds_wherever_files_are_and_however_many_questions_are_answered_together(tmp_path: Path) -> None:
    def measured(data: str = "a.tsv", **changes: Any) -> Measured:
        benchmark = BenchmarkConfig(name="multiple_choice", data=data, **changes)
        return Measured(((benchmark, "sha"),), (f"held-{data}", "sha"), 4, share_features=data == "a.tsv")

    assert measured().identity() == measured(data="elsewhere/a.tsv", batch_size=3).identity()
    assert measured().identity() != measured(answer="likelihood").identity()
