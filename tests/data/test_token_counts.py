"""Token counts: what loading gives, without images, kept on disk for as long as they are true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.data import token_counts
from llava_npu.data.dataset import BadSamples, ConversationDataset
from llava_npu.data.records import open_records
from llava_npu.data.token_counts import load_token_counts
from llava_npu.errors import UserError
from llava_npu.files.cache import cache_root
from llava_npu.models import compose
from support import tiny

Open = Callable[..., ConversationDataset]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    tiny.write_records(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return compose(str(folder / "clip"), str(folder / "lm"), "mlp2x_gelu")[1]


@pytest.fixture
def open_data(folder: Path, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))

    def open_data(
        name: str = "train.json", max_length: int | None = None, bad_samples: BadSamples = "error"
    ) -> ConversationDataset:
        return ConversationDataset(
            open_records(folder / name), processor, max_length=max_length, bad_samples=bad_samples
        )

    return open_data


@pytest.mark.parametrize("max_length", [None, 65])
def test_counts_are_what_loading_gives(open_data: Open, max_length: int | None) -> None:
    data = open_data(max_length=max_length)
    counts = load_token_counts(data, ["fingerprint"])
    samples = [data[index] for index in range(len(data))]
    assert counts.tokens.tolist() == [len(sample.input_ids) for sample in samples]
    images = [0 if sample.pixel_values is None else len(sample.pixel_values) for sample in samples]
    assert counts.images.tolist() == images
    assert {0, 1} < set(images) or max_length


def test_no_picture_is_opened(open_data: Open, folder: Path) -> None:
    records = json.loads((folder / "train.json").read_text())
    for record in records:
        if "image" in record:
            record["image"] = ["nowhere.png"] * (2 if isinstance(record["image"], list) else 1)
    (folder / "without.json").write_text(json.dumps(records))
    counts = load_token_counts(open_data("without.json"), ["without"])
    assert counts.tokens.tolist() == load_token_counts(open_data(), ["with"]).tokens.tolist()


def test_counted_once_until_something_changes(open_data: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    first = load_token_counts(open_data(), ["a"], report=counted.append)
    assert counted == [26]
    again = load_token_counts(open_data(), ["a"], report=counted.append)
    assert counted == [26]
    assert again.tokens.tolist() == first.tokens.tolist()
    for damaged in (cache_root() / "token-counts").rglob("tokens.npy"):
        damaged.unlink()  # `first` maps it
        damaged.write_bytes(b"")
    assert load_token_counts(open_data(), ["a"], report=counted.append).tokens.tolist() == first.tokens.tolist()
    load_token_counts(open_data(), ["other data"], report=counted.append)
    load_token_counts(open_data(max_length=65), ["a"], report=counted.append)
    other = open_data()
    other.template = "chatml"
    load_token_counts(other, ["a"], report=counted.append)
    monkeypatch.setattr(other.processor, "num_image_tokens", 5)
    load_token_counts(open_data(), ["a"], report=counted.append)
    assert counted == [26] * 6


@pytest.mark.slow
def test_several_processes_count_the_same(open_data: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = load_token_counts(open_data(), ["alone"])
    monkeypatch.setattr(token_counts, "_CHUNK", 5)
    shared = load_token_counts(open_data(), ["shared"], workers=2)
    assert shared.tokens.tolist() == alone.tokens.tolist()
    assert shared.images.tolist() == alone.images.tolist()


def test_a_bad_record_stops_the_run_before_it_starts_or_counts_as_its_substitute(
    open_data: Open, folder: Path, tmp_path: Path
) -> None:
    records = json.loads((folder / "train.json").read_text())
    records[3]["conversations"][1]["value"] = ""
    (folder / "bad.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"record 3 \(id '3'\)"):
        load_token_counts(open_data("bad.json"), ["bad"])
    assert not list((tmp_path / "cache/token-counts").glob("[!.]*"))
    data = open_data("bad.json", bad_samples="skip")
    counts = load_token_counts(data, ["bad"])
    stand_in = data.load(3, room=int(counts.tokens[3]))
    assert stand_in.replaced is not None
    assert len(stand_in.input_ids) == counts.tokens[3]


def test_a_stand_in_for_an_unreadable_picture_fits_into_the_place(open_data: Open, folder: Path) -> None:
    records = json.loads((folder / "train.json").read_text())
    for number in range(6):
        records[number]["image"] = "nowhere.png"
    (folder / "missing.json").write_text(json.dumps(records))
    data = open_data("missing.json", bad_samples="skip")
    counts = load_token_counts(data, ["missing"])
    for number in range(6):
        sample = data.load(number, room=int(counts.tokens[number]))
        assert sample.replaced is not None
        assert len(sample.input_ids) <= counts.tokens[number]


def test_a_sample_longer_than_it_was_counted_is_named(open_data: Open) -> None:
    with pytest.raises(UserError, match=r"record 0 .* tokens, but 7 when the run was planned"):
        open_data().load(0, room=7)
