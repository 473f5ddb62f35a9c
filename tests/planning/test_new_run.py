"""`llava-npu init`: a first configuration, from a look at the data to a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_npu.cli import app
from llava_npu.config import load_config
from llava_npu.errors import UserError
from llava_npu.planning.new_run import DataSummary, NewRun, look_at_data
from support import tiny


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    tiny.write_captions(folder)
    return folder


@pytest.mark.slow
def test_a_written_run_trains(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = f"{material}/clip,{material}/lm"
    arguments = ["init", "mine.yaml", "--data", str(material / "captions.json"), "--model", models, "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "llava-npu train mine.yaml" in result.output
    assert "llava-npu chat --model runs/mine/model" in result.output
    assert "recommended" in result.output  # the plan
    written = load_config("mine.yaml")
    assert (written.stage, written.model.projector, written.output) == ("align", "mlp2x_gelu", "runs/mine")
    trained = CliRunner().invoke(app, ["train", "mine.yaml", "max_steps=1", "data.workers=0"])
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "runs/mine/model/config.json").is_file()
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, UserError)
    assert "exists already" in str(again.exception)


def test_without_a_terminal_what_is_missing_is_named(material: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", str(tmp_path / "a.yaml"), "--data", str(material / "captions.json")])
    assert "--model is missing" in str(result.exception)
    assert "--data is missing" in str(CliRunner().invoke(app, ["init", str(tmp_path / "a.yaml")]).exception)
    assert not (tmp_path / "a.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "data.json"),
        (
            '[{"id": 1, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]}]',
            "no.* image",
        ),
        (
            '[{"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, '
            '{"from": "gpt", "value": "A dog"}]}]',
            r"a.png does not exist.*--images",
        ),
        ('[{"image": "a.png"}]', r"data check"),
    ],
)
def test_data_that_cannot_be_learned_from(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        look_at_data(tmp_path / "data.json", None)


@pytest.mark.parametrize(("records", "batch"), [(558_128, 128), (3200, 64), (30, 8)])
def test_batches_leave_steps_to_take(tmp_path: Path, records: int, batch: int) -> None:
    data = DataSummary(tmp_path / "data: 1.json", tmp_path, records, 10, 10, 10)
    run = NewRun(data, "runs/#1", "finetune", "auto", checkpoint="some/model", settings=[("micro_batch_size", "4")])
    (tmp_path / "run.yaml").write_text(run.render())
    config = load_config(tmp_path / "run.yaml")
    assert (config.batch_size, config.micro_batch_size, config.output) == (batch, 4, "runs/#1")
    assert config.data.path == str(tmp_path / "data: 1.json")
    assert config.model.checkpoint == "some/model"
    assert (config.data.validation is None) == (records < 20)
