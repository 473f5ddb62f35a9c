"""What a configuration says of a new model beside a checkpoint is so in the checkpoint, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_npu import UserError
from llava_npu.config import ModelConfig, RunConfig, load_config, render_config
from llava_npu.models import compose
from llava_npu.models.agreement import check_agreement
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.training import train
from support import tiny

SCALES, LAYERS = [1, 2], 3  # of the tiny model


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a resampler of four queries, at two scales."""
    folder = tmp_path_factory.mktemp("agreement")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    model, processor = compose(
        str(folder / "clip"),
        str(folder / "lm"),
        "resampler",
        {"num_queries": 4},
        scales=SCALES,
        vision_feature_layer=-2,
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def _said(**keys: Any) -> dict[str, Any]:
    return ModelConfig(checkpoint="runs/align", **keys).explicit_keys


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"projector": "resampler"},
        {"projector_options": {"num_queries": 4}},
        {"projector": "resampler", "projector_options": {"num_queries": 4, "output_projection": True}},
        {"scales": [1, 2]},
        {"image_size": 28},
        {"vision_feature_layer": -2},
        {"vision_feature_layer": LAYERS - 1},
        {"vision_select_feature": "patch"},
    ],
)
def test_what_the_checkpoint_has_may_be_said(aligned: Path, keys: dict[str, Any]) -> None:
    check_agreement(_said(**keys), "runs/align", LlavaNpuConfig.from_pretrained(aligned / "model"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"projector": "ldpv2"}, "model.projector is 'ldpv2', but the checkpoint has 'resampler'"),
        ({"projector": "mlp2x_gelu"}, "model.projector is 'mlp2x_gelu', but the checkpoint has 'resampler'"),  # default
        (
            {"projector": "cabs", "projector_options": {"depth": 1}},
            "'cabs', but .* 'resampler'\nmodel.c",
        ),
        (
            {"projector_options": {"num_queries": 9}},
            "{'num_queries': 9}, but the .* {'num_queries': 4}",
        ),
        ({"projector_options": {"depth": 9}}, r"is {'depth': 9}, but the checkpoint has {'depth': None}"),
        ({"scales": [1]}, r"model.scales is \[1\], but the checkpoint has \[1, 2\]"),
        ({"image_size": 32}, "model.image_size is 32, but the checkpoint has 28"),
        ({"vision_feature_layer": -1}, "model.vision_feature_layer is -1, but the checkpoint has 2"),
        ({"vision_select_feature": "cls_patch"}, "'cls_patch', but the checkpoint has 'patch'"),
    ],
)
def test_what_it_does_not_have_is_refused(aligned: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_agreement(_said(**keys), "runs/align", LlavaNpuConfig.from_pretrained(aligned / "model"))
    assert "model.checkpoint runs/align brings its own" in str(caught.value)


@pytest.mark.slow
def test_training_refuses_it_and_takes_what_was_written_out(aligned: Path, tmp_path: Path) -> None:
    tiny.write_captions(tmp_path)
    values: dict[str, Any] = {
        "output": str(tmp_path / "out"),
        "stage": "finetune",
        "model": {"checkpoint": str(aligned), "projector": "mlp2x_gelu"},
        "data": {"path": str(tmp_path / "captions.json"), "workers": 0},
        "max_steps": 1,
        "batch_size": 2,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"model\.projector is 'mlp2x_gelu', but the checkpoint has 'resampler'"):
        train(load_config(file))
    assert not (tmp_path / "out").exists()

    # Written out by us it holds every key; those that nobody set are not held against it.
    del values["model"]["projector"]
    file.write_text(render_config(RunConfig.model_validate(values)))
    assert "projector: mlp2x_gelu" in file.read_text()
    assert load_config(file).model.explicit_keys == {}
    train(load_config(file))
    assert (tmp_path / "out/model").is_dir()
    # Changed by hand after that, it is.
    with pytest.raises(UserError, match=r"model\.projector is 'ldp'"):
        train(load_config(file, ["model.projector=ldp", f"output={tmp_path / 'other'}"]))
