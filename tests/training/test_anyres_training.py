"""anyres from outside: a model is trained on images of many shapes, with and without cached features, and used."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_npu.config import RunConfig
from llava_npu.training import train
from support import tiny
from support.commands import run_command

SHAPES = [(30, 20), (28, 28), (90, 25), (25, 80), (60, 60), (14, 50)]  # (width, height)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anyres")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    (folder / "images").mkdir()
    records = []
    noise = np.random.default_rng(0)
    for number in range(12):
        width, height = SHAPES[number % len(SHAPES)]
        colour = list(tiny.COLOURS)[number % 3]
        pixels = np.full((height, width, 3), tiny.COLOURS[colour]) + noise.integers(-10, 10, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"a {colour} square"}]
        records.append({"id": str(number), "image": f"images/{number}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(records))
    two = {
        "id": "two",
        "image": ["images/0.png", "images/2.png"],
        "conversations": _turns("<image> or <image>?", "red"),
    }
    text = {"id": "text", "conversations": _turns("What is it?", "a square")}
    (folder / "talk.json").write_text(json.dumps([*records, two, text]))
    return folder


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _run(files: Path, output: Path, device: torch.device, **changes: object) -> RunConfig:
    values = {
        "output": str(output),
        "stage": "finetune",
        "model": {
            "vision_tower": f"{files}/clip",
            "language_model": f"{files}/lm",
            "image_aspect_ratio": "anyres",
        },
        "data": {"path": f"{files}/talk.json", "workers": 0},
        "batch_size": 7,
        "micro_batch_size": 7,
        "precision": "fp32",
        "device": device.type,
    }
    return RunConfig.model_validate({**values, **changes})


@pytest.mark.slow
def test_every_way_of_splitting_and_caching_trains_the_same_model(
    files: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = {"path": f"{files}/talk.json", "workers": 0, "cache_features": True}
    runs = {
        "plain": {},
        "one at a time": {"micro_batch_size": 1},  # of text alone, too
        "cached": {"data": data},
    }
    weights = {
        name: load_file(train(_run(files, tmp_path / name, device, **changes)) / "model.safetensors")
        for name, changes in runs.items()
    }
    reference = weights["plain"]
    assert any("image_newline" in key for key in reference)
    for name, found in weights.items():
        assert found.keys() == reference.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, reference[key], atol=2e-5, rtol=0, msg=f"{name}: {key}")


@pytest.mark.slow
def test_squares_first_then_tiles_from_the_command_line(files: Path, tmp_path: Path) -> None:
    """As LLaVA-1.6: aligned on padded squares, tuned with anyres; then evaluated and asked."""
    (tmp_path / "align.yaml").write_text(
        f"output: {tmp_path}/align\nstage: align\n"
        f"model: {{vision_tower: {files}/clip, language_model: {files}/lm}}\n"
        f"data: {{path: {files}/captions.json, workers: 0}}\nbatch_size: 6\nmicro_batch_size: 6\n"
    )
    (tmp_path / "tune.yaml").write_text(
        f"output: {tmp_path}/tune\nstage: finetune\n"
        f"model: {{checkpoint: {tmp_path}/align, image_aspect_ratio: anyres,"
        f" image_grid_pinpoints: [[56, 28], [28, 56]]}}\n"
        f"data: {{path: {files}/talk.json, workers: 1}}\nbatch_size: 7\nmicro_batch_size: 7\n"
    )
    for stage in ("align", "tune"):
        _command("train", f"{tmp_path}/{stage}.yaml", "--device", "cpu")
    config = json.loads((tmp_path / "tune/model/config.json").read_text())
    assert (config["model_type"], config["image_grid_pinpoints"]) == ("llava_next", [[28, 56], [56, 28]])
    assert json.loads((tmp_path / "align/model/config.json").read_text())["model_type"] == "llava"

    chat = _command(
        "chat", "--model", f"{tmp_path}/tune", "--device", "cpu", "--max-new-tokens", "4", "--prompt", "What is it?",
        "--image", f"{files}/images/2.png", "--image", f"{files}/images/3.png",
    )  # fmt: skip
    assert chat
    rows = ["index\tquestion\tA\tB\tanswer\timage"]
    for number in range(4):
        picture = (files / f"images/{number}.png").read_bytes()
        rows.append(f"{number}\tWhat is it?\tred\tblue\tA\t{_base64(picture)}")
    (tmp_path / "mmbench.tsv").write_text("\n".join(rows))
    for answer in ("generate", "likelihood"):
        _command(
            "eval", "mmbench", "--model", f"{tmp_path}/tune", "--data", f"{tmp_path}/mmbench.tsv", "--output",
            f"{tmp_path}/{answer}", "--answer", answer, "--device", "cpu", "--max-new-tokens", "3",
        )  # fmt: skip
        report = json.loads((tmp_path / answer / "report.json").read_text())
        assert report["num_questions"] == 4


def _command(*arguments: str) -> str:
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
