"""Configuration files: strict, and every mistake named with its key, file and nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu import UserError
from llava_npu.config import load_config, render_config

GOOD = """
output: runs/x
stage: align
model: {vision_tower: a/b, language_model: c/d}
data: {path: x.json}
optimizer: {learning_rate: 2e-5}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_defaults_numbers_and_overrides(file: Path) -> None:
    config = load_config(file, ["batch_size=8", "optimizer.betas=[0.9, 0.95]", "data.workers=0", "data.workers=4"])
    assert config.optimizer.learning_rate == 2e-5  # YAML 1.1 would read a string
    assert (config.batch_size, config.data.workers, config.optimizer.betas) == (8, 4, (0.9, 0.95))
    assert config.model.projector == "mlp2x_gelu"


def test_what_is_printed_is_the_same_run(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["model.projector_options={num_queries: 36}", "model.projector=ldpv2"])
    (tmp_path / "printed.yaml").write_text(render_config(config))
    assert load_config(tmp_path / "printed.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learnig_rate=3", r"unknown key `optimizer.learnig_rate`. Did you mean 'learning_rate'\?"),
        ("batch_sise=3", r"unknown key `batch_sise`. Did you mean 'batch_size'\?"),
        ("batch_size=eight", "`batch_size` is 'eight': Input should be a valid integer"),
        ("batch_size=8.5", "`batch_size` is 8.5"),
        ("gradient_checkpointing=1", "`gradient_checkpointing` is 1: Input should be a valid boolean"),
        ("stage=algn", "Input should be 'align' or 'finetune'"),
        ("epochs=0", "greater than or equal to 1"),
        ("optimizer.learning_rate=-1", "greater than 0"),
        ("model.checkpoint=x", "`checkpoint` already holds a tower"),
        ("model.vision_tower=null", "give `checkpoint`, or both"),
        ("data.template=vicunna", r"`data.template` is 'vicunna': .* Did you mean 'vicuna'\?"),
        ("data.sources=[{path:x.json}]", r"unknown key `data.sources.0.path:x.json`. In YAML a space follows"),
        ("optimizer=3", "`optimizer` is 3: it is a section of keys"),
        ("nonsense", "not of the form key=value"),
        ("batch_size=[", "not valid YAML"),
        ("stage.deep=3", "`stage` is a value, not a section"),
    ],
)
def test_mistakes_on_the_command_line_are_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(file, [override])
    if "=" in override and "checkpoint=" not in override and "vision_tower" not in override and "deep" not in override:
        with pytest.raises(UserError, match="command line"):
            load_config(file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("stage: align\n", ""), "`stage` is required"),
        (GOOD + "typo: 1\n", r"run\.yaml: unknown key `typo`"),
        (GOOD + "stage: finetune\n", "'stage' is given twice"),
        ("- a\n- b\n", "found list"),
        ("a: [1", "not valid YAML"),
        ("", "found nothing"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "run.yaml")


def test_all_mistakes_are_listed_at_once(file: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_config(file, ["epochs=0", "seed=-1"])
    assert "`epochs`" in str(raised.value)
    assert "`seed`" in str(raised.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")


# ---- files that begin with another ----


def _write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_base_gives_what_the_file_leaves_open(file: Path, tmp_path: Path) -> None:
    options = "model: {projector: resampler, projector_options: {num_queries: 36, num_heads: 2}}"
    _write(
        tmp_path,
        middle=f"base: run.yaml\n{options}\nseed: 3\n",
        other="optimizer: {weight_decay: 0.1}\n",
        top="base: [middle.yaml, other.yaml]\nseed: 4\nmodel: {projector_options: {num_queries: 16}}\n",
    )
    config = load_config(tmp_path / "top.yaml", ["epochs=2"])
    assert (config.seed, config.epochs, config.stage) == (4, 2, "align")
    assert config.optimizer.learning_rate == 2e-5
    assert config.optimizer.weight_decay == 0.1
    assert config.model.vision_tower == "a/b"
    assert config.model.projector == "resampler"
    assert config.model.projector_options == {"num_queries": 16}, "options are replaced as a whole"


def test_a_mistake_is_named_with_the_file_that_holds_it(file: Path, tmp_path: Path) -> None:
    _write(tmp_path, top="base: middle.yaml\nseed: 4\n", middle="base: run.yaml\nbatch_sise: 3\nepochs: 0\n")
    with pytest.raises(UserError) as raised:
        load_config(tmp_path / "top.yaml", ["log_every=0"])
    message = str(raised.value)
    assert "command line: log_every=0: `log_every`" in message
    assert "middle.yaml: `epochs`" in message
    assert "middle.yaml: unknown key `batch_sise`" in message


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("base: top.yaml", r"top\.yaml: `base` leads back to .*top\.yaml"),
        ("base: absent.yaml", r"absent\.yaml: there is no such configuration file"),
        ("base: 3", r"`base` is 3; it names a configuration file, or a list of them"),
    ],
)
def test_a_base_that_cannot_be(tmp_path: Path, base: str, message: str) -> None:
    _write(tmp_path, top=base)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "top.yaml")
