"""Model folders that came half, of another kind or broken: one error that names the file and the fix, in every door."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.models import load
from llava_npu.models.checkpoints.convert import Help, convert
from llava_npu.models.checkpoints.weight_files import check_finite
from llava_npu.models.sources import read_source
from llava_npu.training.resolve import ResolvedRun
from support import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 14000000000\n"
Damage = Callable[[Path], object]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "m"))


def _text(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def _config(**changes: object) -> Damage:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            part, _, inner = key.rpartition("__")
            (values[part] if part else values)[inner] = value
        (folder / "config.json").write_text(json.dumps(values))

    return change


def _cut(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def _index(weight_map: object) -> Damage:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def _weight(value: float) -> Damage:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if "linear_1.weight" in name)
        weights[name][0, 0] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _whole_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "linear_1.weight" in name)
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _new_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["type"] = "ByteTransducer"  # a kind that this release of tokenizers does not know
    (folder / "tokenizer.json").write_text(json.dumps(values))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights of LFS": (_text("model.safetensors", POINTER), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "tokenizer of LFS": (_text("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "no bytes": (_text("model.safetensors", ""), r"model\.safetensors is empty \(0 bytes\)"),
    "a web page": (_text("config.json", "<!DOCTYPE html>"), r"config\.json is a web page"),
    "cut short": (_cut("model.safetensors"), r"model\.safetensors cannot be read .*cut short"),
    "text for a number": (_config(text_config__hidden_size="48"), r"config\.json.*'hidden_size' expected int, got str"),
    "list for a section": (_config(vision_config=[1]), r"config\.json: `vision_config` is \[1\]"),
    "no section": (_config(text_config=None), r"config\.json: `text_config` is None"),
    "another projector": (
        _config(projector_hidden_act="relu"),
        r"projector_hidden_act 'relu': projectors compute with",
    ),
    "unknown activation": (_config(text_config__hidden_act="zzz"), r"KeyError: 'zzz'"),
    "absurd layers": (_config(text_config__num_hidden_layers=10**12), r"`num_hidden_layers` is 1000000000000; allowed"),
    "absurd width": (
        _config(text_config__intermediate_size=10**8),
        r"describes a model of [\d,]+ weights|calls for \(48, 1",
    ),
    "missing shard": (
        _index({"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}),
        r"model-00002-of-00002\.safetensors",
    ),
    "no map": (_index([1]), r"index\.json: is not an index of weights"),
    "a shard elsewhere": (_index({"a": "../x.safetensors"}), r"names '\.\./x\.safetensors', which is not a file of"),
    "nan": (_weight(float("nan")), r"NaN or infinite, 1 in all: \S*linear_1\.weight"),
    "infinite": (_weight(float("inf")), r"NaN or infinite, 1 in all: \S*linear_1\.weight"),
    "whole numbers": (_whole_numbers, r"linear_1\.weight is of type I8, not of floating-point numbers"),
    "generation settings": (_text("generation_config.json", "\0"), r"generation_config\.json is damaged, not JSON"),
    "newer tokenizer": (_new_tokenizer, r"tokenizer\.json holds what .* does not know: .*newer release\. Upgrade"),
    "other image size": (
        _text("processor_config.json", json.dumps({"image_processor": {"image_processor_type": "CLIPImageProcessor"}})),
        r"makes images of 224×224 pixels, but the model takes 28×28",
    ),
    "unknown template": (_text("processor_config.json", '{"template": ["v1"]}'), r"processor_config\.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_opened_and_converted(folder: Path, damage: str, tmp_path: Path) -> None:
    """`load` is what chat, serve, web, eval and merge open models with."""
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError, match=message) as opened:
        load(folder, "cpu")
    assert str(folder) in str(opened.value)
    with pytest.raises(UserError, match=message):
        convert(str(folder), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("damage", ["text for a number", "list for a section", "tokenizer of LFS", "a web page"])
def test_trained_from(folder: Path, damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    values = {"stage": "finetune", "output": str(tmp_path / "run"), "data": {"path": "x.json"}}
    values |= {"model": {"checkpoint": str(folder)}, "optimizer": {"learning_rate": 1e-3}}
    with pytest.raises(UserError, match=message):
        ResolvedRun(RunConfig.model_validate(values)).check_model()


def test_a_projector_alone(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    tower = str(tiny.write_clip(tmp_path / "clip"))
    (tmp_path / "p/config.json").write_text(json.dumps({"mm_vision_tower": tower, "mm_vision_select_layer": -2}))
    (tmp_path / "p/mm_projector.bin").write_text(POINTER)
    with pytest.raises(UserError, match=r"mm_projector\.bin is a Git LFS pointer"):
        convert(str(tmp_path / "p"), tmp_path / "out", "hf", Help(base=str(tmp_path)))


def test_a_read_only_place_and_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, message in (
        (errno.EROFS, r"out: cannot be written: Read-only"),
        (errno.ENOSPC, "no space left on the"),
    ):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path / ".out.partial/model.safetensors"))

        monkeypatch.setattr("llava_npu.models.checkpoints.hugging_face.write_weights", fail)
        with pytest.raises(UserError, match=message):
            convert(str(folder), tmp_path / "out", "hf")
        assert not list(tmp_path.glob("*out*"))


def test_weights_get_the_permissions_of_the_umask(folder: Path, tmp_path: Path) -> None:
    convert(str(folder), tmp_path / "out", "hf")
    (tmp_path / "other").touch()
    usual = (tmp_path / "other").stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {usual}
    load(folder).save_pretrained(tmp_path / "saved")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {usual}


def test_launched_processes_share_the_search_for_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")])), ("c", torch.ones(2))]
    with pytest.raises(UserError, match="NaN or infinite, 1 in all: b"):
        check_finite(weights, "x", shared=True)
    found = []
    for number in range(2):
        variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "here", "MASTER_PORT": 1}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        try:
            check_finite(weights, "x", shared=True)
        except UserError:
            found.append(number)
        with pytest.raises(UserError):
            check_finite(weights, "x")
    assert found == [1]


@pytest.mark.parametrize("values", [{"changes": " "}, {"changes": {"x": 1}}, {"changes": [1]}, {"parts": 3}, [], 3])
def test_a_damaged_description_of_an_adapters_base(values: object, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps({"checkpoint": "tiny/base", **values} if isinstance(values, dict) else values))
    with pytest.raises(UserError, match=r"base\.json: cannot be read as the description of a base model"):
        read_source(path)
