"""Configuration files: strict, and every mistake named with its key, file and nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu import UserError
from llava_npu.config import load_config, render_config
from llava_npu.config.recipes import find_recipe
from llava_npu.config.yaml_reader import read_yaml, write_yaml

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
        ("gradient_checkpointing=0", "`gradient_checkpointing` is 0: .*allowed are true, false, auto, or a number"),
        ("stage=algn", "Input should be 'align' or 'finetune'"),
        ("epochs=0", "greater than or equal to 1"),
        ("optimizer.learning_rate=-1", "greater than 0"),
        ("model.checkpoint=x", "`checkpoint` already has a vision tower"),
        ("model.vision_tower=null", "give `checkpoint`, or both"),
        ("data.template=vicunna", r"`data.template` is 'vicunna': .* Did you mean 'vicuna'\?"),
        ("data.sources=[{path:x.json}]", r"unknown key `data.sources.0.path:x.json`. In YAML a space follows"),
        ("optimizer=3", "`optimizer` is 3: it is a section of keys"),
        ("nonsense", "does not have the form key=value"),
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
        ("".join(f"key_{number}: 1\n" for number in range(900)), r"key_15`.*\n.*: and 884 more mistakes"),
        ("a: !!bool perhaps", "not valid YAML"),
        ("a:\n\tb: 1", "not valid YAML: while scanning"),
        ("#" * (2**18 + 1), r"run\.yaml: is larger than 256 KiB"),
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
        ("base: absent.yaml", r"absent\.yaml: no such configuration file"),
        ("base: 3", r"`base` is 3; it takes the name of a configuration file, or a list of them"),
    ],
)
def test_a_base_that_cannot_be(tmp_path: Path, base: str, message: str) -> None:
    _write(tmp_path, top=base)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "top.yaml")


def test_another_projector_or_engine_drops_the_options_of_the_former(file: Path, tmp_path: Path) -> None:
    options = "{projector: resampler, projector_options: {num_queries: 36}}"
    _write(tmp_path, top=f"base: run.yaml\nmodel: {options}\nengine: fsdp2\nengine_options: {{offload: true}}\n")
    top = tmp_path / "top.yaml"
    same = load_config(top, ["model.projector=resampler", "engine=fsdp2"])
    assert (same.model.projector_options, same.engine_options) == ({"num_queries": 36}, {"offload": True})
    other = load_config(top, ["model.projector=ldpv2", "engine=ddp"])
    assert (other.model.projector_options, other.engine_options) == ({}, {})
    for overrides in (["projector=ldpv2", "projector_options.n=4"], ["projector_options.n=4", "projector=ldpv2"]):
        given = load_config(top, [f"model.{each}" for each in overrides])
        assert given.model.projector_options["n"] == 4, "in any order"
    _write(tmp_path, above="base: top.yaml\nmodel: {projector: ldpv2}\n")
    assert load_config(tmp_path / "above.yaml").model.projector_options == {}


def test_texts_refer_to_other_keys(file: Path) -> None:
    reference = "output=runs/${model.projector}-${batch_size}"
    assert load_config(file, [reference]).output == "runs/mlp2x_gelu-256", "defaults included"
    assert load_config(file, [reference, "model.projector=ldpv2", "batch_size=8"]).output == "runs/ldpv2-8"
    for key, message in (
        ("modle.projector", "no such key"),
        ("model", "plain text"),
        ("max_steps", "plain text"),
    ):
        with pytest.raises(UserError, match=rf"`output` refers to \${{{key}}}.*{message}"):
            load_config(file, [f"output=${{{key}}}"])


# ---- values that parse but cannot be ----


def test_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    text = GOOD.replace("{learning_rate: 2e-5}", "{<<: *common, learning_rate: 2e-5}")
    _write(tmp_path, run=text + "parts: {projector: &common {weight_decay: 0.5}, language_model: {<<: *common}}\n")
    with pytest.raises(UserError, match="not valid YAML: found undefined alias"):
        load_config(tmp_path / "run.yaml")
    parts = "parts: {projector: &common {weight_decay: 0.5}, language_model: {<<: *common, train: lora}}\n"
    _write(tmp_path, run=GOOD + parts)
    config = load_config(tmp_path / "run.yaml")
    assert (config.parts.language_model.weight_decay, config.parts.language_model.train) == (0.5, "lora")
    assert config.parts.projector.weight_decay == 0.5


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: 2026-02-30\n", "`output` is 2026-02-30, which YAML takes for a date; put it in quotes"),
        ("output: 2026-02-03\n", "`output` is 2026-02-03, which YAML takes for a date"),
        ('output: "a\\0b"\n', "`output` holds a NUL character"),
        ('output: "a\\uD800b"\n', "`output` holds half of a surrogate pair"),
        ('base: "a\\0b"\n', "`base` holds a NUL character"),
        ("output: ''\n", "`output` is '': String should have at least 1 character"),
        ("data: {path: !!binary aGk=}\n", "`data.path` has the YAML type bytes"),
        ("data: {? [a, b] : 1}\n", "key that is a list or a mapping, in line 1"),
        ("data: {1: x}\n", "`data` has the key 1, which is not text"),
        (f"seed: {2**32}\n", r"`seed` is 4294967296: Input should be less than 4294967296"),
        (f"batch_size: {2**62}\n", r"`batch_size` is \d+: Input should be less than or equal to 1000000"),
        ("seed: 010\n", "`seed` is '010': Input should be a valid integer"),
        ("max_steps: 1:30\n", "`max_steps` is '1:30': Input should be a valid integer"),
        (f"seed: {'9' * 5000}\n", r"`seed` is '9{99}… \(5,002 characters\): Input should be a valid integer"),
        ("seed: 9223372036854775808\n", "`seed` is 9223372036854775808, which is too large"),
        ("optimizer: {weight_decay: .inf}\n", "`optimizer.weight_decay` is inf, and has to be a finite number"),
        ("optimizer: {betas: [.nan, 0.9]}\n", "`optimizer.betas.0` is nan, and has to be a finite number"),
        ("optimizer: {betas: [0.9, 1.5]}\n", r"`optimizer.betas` is \[0.9, 1.5\]: each has to be at least 0"),
        ("model: {projector_options: {eps: 1e999}}\n", "`model.projector_options.eps` is inf"),
        ("model: &m {projector_options: *m}\n", "anchor that contains itself, in line 1"),
        (f"{BOMB}\n", "more than 100,000 values once its aliases are written out"),
        (f"model: {'[' * 5000}\n", "nested too deeply"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_key(tmp_path: Path, text: str, message: str) -> None:
    _write(tmp_path, good=GOOD, run=text if text.startswith("base") else f"{text}base: good.yaml\n")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.weight_decay=.inf",
        "optimizer.betas=[.nan,0.9]",
        "seed=010",
        f"output={300 * 'x'}",
        f"output={5000 * '9'}",
    ],
)
def test_overrides_are_held_to_the_same(file: Path, override: str) -> None:
    with pytest.raises(UserError, match=rf"command line: .*{override.split('=')[0]}"):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-5", 2e-5), ("1_000", 1000), ("-0.5", -0.5), ("0x10", 16), (".5", 0.5), ("1.", 1.0), ("1e5", 1e5), ("+3", 3)],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


@pytest.mark.parametrize(
    "text", ["2e-05", "1_0", "0x1f", "010", "1:30", "2026-11-30", "yes", "null", ".inf", "=", "a\nb", ""]
)
def test_text_that_looks_like_something_else_is_written_as_text(text: str) -> None:
    assert read_yaml(write_yaml({"note": text})) == {"note": text}


def test_home_folders_are_expanded_wherever_a_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _write(tmp_path, common="output: ~/runs/x\nstage: align\n")
    data = "{sources: [{path: ~/a.json, image_root: ~/images}], image_root: ~/all, validation: {path: ~/v.json}}"
    model = "{vision_tower: ~/tower, language_model: ~/llm}"
    _write(tmp_path, run=f"base: ~/common.yaml\nmodel: {model}\ndata: {data}\n")
    monkeypatch.chdir("/")
    config = load_config(find_recipe("~/run.yaml"))
    assert "~" not in render_config(config)
    assert config.data.sources[0].path == str(tmp_path / "a.json")
    assert config.output_path == tmp_path / "runs/x"
    assert config.model.vision_tower == str(tmp_path / "tower")


def test_encodings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD, encoding="utf-8-sig")
    assert load_config(tmp_path / "run.yaml").output == "runs/x"
    (tmp_path / "run.yaml").write_text(GOOD, encoding="utf-16")
    with pytest.raises(UserError, match=r"run\.yaml: is not UTF-8 \(byte 0: .*save it as UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_characters_that_yaml_does_not_allow(file: Path, tmp_path: Path) -> None:
    (tmp_path / "nul.yaml").write_bytes(b"output: a\0b\n")
    with pytest.raises(UserError, match=r"nul\.yaml: is not valid YAML: unacceptable character #x0000"):
        load_config(tmp_path / "nul.yaml")
    with pytest.raises(UserError, match=r"command line: .*is not valid YAML: unacceptable character"):
        load_config(file, ["output=a\0b"])
