"""Data sets by name, defined in `datasets.yaml`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_npu.config import load_config
from llava_npu.config.datasets import ENVIRONMENT
from llava_npu.errors import UserError

RUN = "output: out\nstage: finetune\nmodel: {checkpoint: m}\ndata: {sources: SOURCES}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    (tmp_path / "datasets.yaml").write_text(
        "captions: {path: captions.json, images: images, weight: 0.5, template: v1}\n"
        "pages: {path: /data/pages.jsonl, limit: 7, template: v1}\n"
        "chats: {path: chats.json, template: llama_2}\n"
    )
    return tmp_path


def _run(folder: Path, sources: str, *overrides: str) -> object:
    (folder / "run.yaml").write_text(RUN.replace("SOURCES", sources))
    return load_config(folder / "run.yaml", overrides).data


def test_names_stand_for_data_sets(here: Path) -> None:
    data = _run(here, "[captions, pages, {path: more.json}]", "data.template=v1")
    first, second, third = data.sources
    assert (first.path, first.image_root, first.weight) == (str(here / "captions.json"), str(here / "images"), 0.5)
    assert (second.path, second.limit, third.path) == ("/data/pages.jsonl", 7, "more.json")
    assert _run(here, "[]", "data.sources=[captions]").sources[0].path == str(here / "captions.json")


def test_the_template_that_all_have_is_the_runs(here: Path) -> None:
    assert _run(here, "[captions, pages]").template == "v1"
    assert _run(here, "[captions, chats]", "data.template=chatml").template == "chatml"
    with pytest.raises(UserError, match=r"different templates \(captions: v1, chats: llama_2\).*data.template"):
        _run(here, "[captions, chats]")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[caption]", "unknown data set 'caption'. Did you mean 'captions'.*captions, chats, pages"),
        ("[chats, 7]", "different templates"),
        ("[captions, chats, captions]", "names 'captions' twice.*`weight` in datasets.yaml"),
    ],
)
def test_unknown_names(here: Path, sources: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _run(here, sources)


def test_a_name_in_two_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "elsewhere/datasets.yaml").write_text("captions: {path: other.json}\nown: {path: own.json}\n")
    with pytest.raises(UserError, match=r"'captions', which is defined in .*datasets.yaml and in .*datasets.yaml"):
        _run(here, "[captions]")
    assert Path(_run(here, "[own]").sources[0].path).name == "own.json"
    (here / "third.yaml").write_text("third: {path: 3.json}\n")
    monkeypatch.setenv(ENVIRONMENT, str(here / "third.yaml"))
    assert _run(here, "[third]").sources[0].path == str(here / "3.json")
    monkeypatch.setenv(ENVIRONMENT, os.pathsep.join([str(here / "third.yaml"), str(here / "absent.yaml")]))
    with pytest.raises(UserError, match=r"absent.yaml does not exist"):
        _run(here, "[third]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("captions: {paht: x}", "`captions.path`.*path, images, template, weight, limit"),
        ("captions: {path: x, weight: -1}", "`captions.weight`"),
        ("captions: {path: x, sources: y}", "`captions.sources`"),
        ("[captions]", "should map names"),
        ("captions: {", "datasets.yaml: "),
    ],
)
def test_damaged_files(here: Path, text: str, message: str) -> None:
    (here / "datasets.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        _run(here, "[captions]")
