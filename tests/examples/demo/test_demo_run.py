"""The whole demo on packages and models small enough for a test: everything happens, nothing is learned."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification
from typer.testing import CliRunner

from demo import assets, weights
from demo.concepts import word_set
from demo.data import Sizes
from demo.profiles import PROFILES, Profile, StageRecipe
from demo.run import run_demo
from demo.shapes import COLOURS, KINDS
from llava_npu.cli import app
from llava_npu.errors import UserError
from llava_npu.files.cache import build_once
from support.tiny import tokenizer as tiny_tokenizer

NOUNS = sorted(
    word_set("zebra lemon trumpet camera tiger owl banana hammer rocket castle igloo candle teapot spoon kite tractor")
)
EMOJI = [
    *sorted(word_set("zebra pizza violin grapes globe anchor bell book axe whale fox giraffe ladder magnet drum")),
    *(f"{noun} cake" for noun in sorted(word_set("moon fish bean plum corn leek kale rice oat nut"))),
]
TINY = Profile(
    name="tiny",
    sizes=Sizes(held_out=6, train_pictures=20, train_shapes=6, shape_questions=3, conversations=12, by_letter=True),
    image_size=32,
    image_tokens=1,
    align=StageRecipe(steps=2, batch_size=4, learning_rate=1e-3),
    finetune=StageRecipe(steps=3, batch_size=4, learning_rate=1e-4, projector_learning_rate=1e-4),
    examples=4,
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """A cache in which everything was fetched and converted before; no client can be run."""
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("npm_config_offline", "true")  # of the npm that the environment itself has
    monkeypatch.setitem(PROFILES, "tiny", TINY)
    for asset in assets.ASSETS:

        def fill(folder, asset=asset):
            (folder / assets.LICENCE_FILE).write_text(f"licence of {asset.name}")
            _FILLERS.get(asset.name, lambda folder: None)(folder)

        build_once(assets.cache_root() / "assets" / f"{asset.name}-{asset.sha256[:12]}", fill)
    torch.manual_seed(0)
    models = assets.cache_root() / "models"
    build_once(models / f"smollm2-135m-instruct-v{weights.CONVERSION}", _fill_language_model)
    build_once(models / f"resnet-50-imagenet-{TINY.image_size}-v{weights.CONVERSION}", _fill_tower)


def _fill_language_model(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = weights._CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip


def _fill_tower(folder):
    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(weights.preprocessing(TINY.image_size)))


def _picture(path: Path, number: int, side: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _fill_stamps(folder: Path) -> None:
    for number, noun in enumerate(NOUNS):
        path = folder / "usr/share/tuxpaint/stamps/animals" / f"{noun}.png"
        _picture(path, number)
        path.with_suffix(".txt").write_text(f"A {noun}.\nde=Etwas.\n")


def _fill_emoji(folder: Path) -> None:
    for number in range(len(EMOJI)):
        _picture(folder / "package/assets" / f"{number}.webp", 100 + number)


def _fill_names(folder: Path) -> None:
    (folder / "package/en").mkdir(parents=True)
    entries = [{"label": label, "hexcode": str(number), "group": 3} for number, label in enumerate(EMOJI)]
    (folder / "package/en/data.json").write_text(json.dumps(entries))


def _fill_shapes(folder: Path) -> None:
    for split, count in (("train", 8), ("test", 12)):
        questions = []
        for number in range(count):
            colour, kind = COLOURS[number % 8], KINDS[number % 3]
            questions += [["what color is the shape?", colour, number], ["what shape is present?", kind, number]]
            questions += [["is there a red shape?", "no", number], ["is no shape present?", "no", number]]
            _picture(folder / f"easy_vqa/data/{split}/images/{number}.png", 200 + number, 16)
        (folder / f"easy_vqa/data/{split}/questions.json").write_text(json.dumps(questions))


_FILLERS = {
    assets.STAMPS.name: _fill_stamps,
    assets.EMOJI_IMAGES.name: _fill_emoji,
    assets.EMOJI_NAMES.name: _fill_names,
    assets.EASY_VQA.name: _fill_shapes,
}


def _run(output: Path, seed: int = 0) -> Path:
    return run_demo("tiny", output, device="cpu", seed=seed, console=Console(quiet=True))


@pytest.mark.slow
def test_whole_way_and_going_on(tmp_path):
    output = tmp_path / "run"
    report = _run(output)
    page = report.read_text()
    assert "not CLIP" in page
    assert page.count('class="card"') == TINY.examples
    results = json.loads((output / "results.json").read_text())
    for state in ("untrained", "aligned", "tuned"):
        assert {"caption loss", "captioning", "answering"} <= set(results["measured"][state])
    assert set(results["measured"]["tuned"]["letters"]) == {"given", "none", "shuffled"}
    # Each stage moves what it should: the projector first, then both.
    assert results["measured"]["untrained"]["caption loss"] != results["measured"]["aligned"]["caption loss"]
    assert {path.name for path in (output / "licences").iterdir()} == {f"{asset.name}.txt" for asset in assets.ASSETS}
    assert (output / "finetune/model/model.safetensors").is_file()

    # A run that stopped before the last stage goes on: what is done is not done again.
    before = (output / "measured/aligned/measured.json").stat().st_mtime_ns
    shutil.rmtree(output / "finetune")
    shutil.rmtree(output / "measured/tuned")
    report.unlink()
    _run(output)
    again = json.loads((output / "results.json").read_text())
    assert (output / "measured/aligned/measured.json").stat().st_mtime_ns == before
    assert again["measured"] == results["measured"]

    with pytest.raises(UserError, match=r"seed: 0 → 1"):
        _run(output, seed=1)

    for command in re.findall(r"`llava-npu (.+)`", (output / "results.md").read_text().split("## What to try next")[1]):
        command = command.replace("QUESTIONS.tsv", str(output / "data/benchmark.tsv"))
        quick = " --print-config" if command.startswith("train") else ""
        result = CliRunner().invoke(app, shlex.split(command + quick))
        assert result.exit_code == 0, (command, result.output, result.exception)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_same_seed_same_numbers(tmp_path):
    first, second = (
        json.loads((_run(tmp_path / name, seed=3).parent / "results.json").read_text()) for name in ("a", "b")
    )
    assert first["measured"] == second["measured"]


@pytest.mark.slow
def test_without_apt_the_demo_goes_on_and_says_so(tmp_path):
    shutil.rmtree(next((assets.cache_root() / "assets").glob(f"{assets.STAMPS.name}-*")))
    page = _run(tmp_path / "run").read_text()
    assert "apt-get is missing" in page
    assert "no photographs" in page
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["split"]["pictures_by_source"]) == {"emoji"}
    assert len(results["split"]["held_out"]) == len(EMOJI) // 6  # fewer are held out, so that enough are left


def test_output_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty .* and was not created by"):
        _run(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_no_network_on_the_first_run_is_one_error(tmp_path):
    shutil.rmtree(assets.cache_root() / "assets")
    with pytest.raises(UserError) as caught:
        _run(tmp_path / "run")
    for asset in assets.ASSETS:
        assert asset.command in str(caught.value)
