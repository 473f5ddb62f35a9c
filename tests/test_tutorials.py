"""Every command, file and snippet of docs/tutorials runs, in order, on tiny models that bear the names of real ones."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_npu.cli import app
from llava_npu.debug_size.assets import make_assets, make_questions
from llava_npu.inference.engine import InferenceEngine
from llava_npu.models import compose, load
from llava_npu.serving.api.limits import Limits
from llava_npu.serving.api.service import Service
from support.running import running

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# What has tests of its own and takes long, needs a network, or runs until it is stopped.
NOT_RUN = ("llava-npu verify", "llava-npu download", "llava-npu doctor", "llava-npu web")
TOWER, LANGUAGE_MODEL = "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tutorials say one needs: a folder `organisation/name` that is there is meant, before any hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = tmp_path / "made"
    make_assets(made)
    make_questions(made)
    for source, target in {
        "clip": TOWER,
        "llama": LANGUAGE_MODEL,
        "images": "images",
        "captions.json": "captions.json",
        "conversations.json": "my.json",
        "questions.tsv": "my_questions.tsv",
    }.items():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made / source, tmp_path / target)
    return tmp_path


def _commands(block: str) -> Iterator[list[str]]:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "llava-npu", line
            yield words[1:]


def _run(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"llava-npu {shlex.join(arguments)}\n{result.output}\n{result.exception}"


def _follow(tutorial: str, folder: Path, changes: dict[str, str] | None = None) -> None:
    """`changes`: text of commands, and what the test puts in its place."""
    text = (TUTORIALS / tutorial).read_text(encoding="utf-8")
    with ExitStack() as servers:
        address = ""
        for language, block in BLOCK.findall(text):
            if language == "yaml":
                name = block.split("\n", 1)[0].removeprefix("# ")
                (folder / name).write_text(block, encoding="utf-8")
            elif language == "python":
                exec(block.replace("http://127.0.0.1:8000", address), {})
            else:
                for old, new in (changes or {}).items():
                    block = block.replace(old, new)
                for arguments in _commands(block):
                    if arguments[0] == "serve":
                        model, name = (arguments[arguments.index(each) + 1] for each in ("--model", "--name"))
                        service = Service(InferenceEngine(load(folder / model, "cpu"), max_batch=4), name, Limits())
                        address = servers.enter_context(running(service))
                    elif not shlex.join(["llava-npu", *arguments]).startswith(NOT_RUN):
                        _run(arguments)


def _model(folder: Path, name: str) -> Path:
    """A model that is there already, as `train` leaves it."""
    model, processor = compose(TOWER, LANGUAGE_MODEL)
    for part in (model, processor):
        part.save_pretrained(folder / name)
    return folder / name


@pytest.mark.slow
def test_own_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _follow("own-data.md", folder)
    assert (folder / "runs/finetune-blind/report.md").is_file()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_compare_projectors(folder: Path) -> None:
    _follow("compare-projectors.md", folder)
    table = (folder / "runs/grid/comparison.md").read_text(encoding="utf-8")
    assert "resampler" in table
    assert (folder / "both/index.html").is_file()


@pytest.mark.slow
def test_evaluate(folder: Path) -> None:
    _model(folder, "their-llava")
    _model(folder, "runs/align/model")
    _follow("evaluate.md", folder)
    assert (folder / "runs/both/comparison.html").is_file()


@pytest.mark.slow
def test_serve(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _model(folder, "runs/finetune/model")
    _follow("serve.md", folder)
    assert (folder / "my-llava-hf/config.json").is_file()


@pytest.mark.slow
def test_llava_on_910b(folder: Path) -> None:
    (folder / "data").mkdir()
    for source, target in {"captions": "blip_laion_cc_sbu_558k", "my": "llava_v1_5_mix665k"}.items():
        shutil.copy(folder / f"{source}.json", folder / f"data/{target}.json")
    (folder / "data/images").symlink_to(folder)
    shutil.copy(folder / "my_questions.tsv", folder / "mmbench_dev_en.tsv")
    at_debug_size = {
        "train llava-v1.5-7b-align --devices 8": "train llava-v1.5-7b-align --debug-size --device cpu",
        "train llava-v1.5-7b-finetune --devices 8": "train llava-v1.5-7b-finetune --debug-size --device cpu",
        "runs/llava-v1.5-7b-finetune": "runs/debug-size/llava-v1.5-7b-finetune",
    }
    _follow("llava-v1.5-on-910b.md", folder, at_debug_size)
    assert (folder / "llava-official/config.json").is_file()


def test_every_tutorial_is_followed() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    for path in TUTORIALS.glob("*.md"):
        assert f'_follow("{path.name}"' in here, path.name
