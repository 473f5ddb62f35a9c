"""The data of a run: mixtures, archives, tables, and samples that cannot be used."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save, save_file

from llava_npu import UserError
from llava_npu.config import DataConfig, RunConfig
from llava_npu.data.records import Source
from llava_npu.models.vision.feature_cache import FeatureStore
from llava_npu.training import data as run_data
from llava_npu.training import train, trainer
from llava_npu.training.bad_samples import BAD_SAMPLES, note_bad_samples, refuse_too_many, rewind_bad_samples
from llava_npu.training.checkpointing.checkpoints import checkpoints
from llava_npu.training.monitoring.metrics import read_metrics

MakeRun = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))


def losses(run: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(run.output_path)]


def run_and_listen(run: RunConfig) -> str:
    console = Console(file=io.StringIO(), width=400)
    train(run, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_sources_of_a_configuration() -> None:
    config = DataConfig.model_validate(
        {
            "sources": [{"path": "a.json"}, {"path": "b.json", "image_root": "b.tar", "weight": 2, "limit": 5}],
            "image_root": "images",
            "allow_absolute_paths": True,
        }
    )
    assert run_data.sources(config) == [
        Source("a.json", "images", 1.0, None, True),
        Source("b.json", "b.tar", 2.0, 5, True),
    ]
    assert run_data.sources(DataConfig(path="a.json")) == [Source("a.json")]


@pytest.mark.parametrize("values", [{}, {"path": "a.json", "sources": [{"path": "b.json"}]}])
def test_path_or_sources(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="set either `path` or, for a mixture, `sources`"):
        DataConfig.model_validate(values)


@pytest.mark.slow
def test_the_way_in_changes_no_number(make_run: MakeRun, material: Path, tmp_path: Path) -> None:
    """The same samples as a list, as lines with images in an archive, and as two sources."""
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(material / "images", "images")
    entries = json.loads((material / "train.json").read_text())
    half = len(entries) // 2
    for name, part in (("all", entries), ("first", entries[:half]), ("second", entries[half:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    ways = {
        "list": {"path": str(material / "train.json")},
        "archive": {"path": str(tmp_path / "all.jsonl"), "image_root": str(tmp_path / "all.tar")},
        "sources": {
            "path": None,
            "sources": [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("first", "second")],
            "image_root": str(material),
        },
    }
    found = {}
    for name, data in ways.items():
        run = make_run(name, data=data, max_steps=2)
        train(run)
        found[name] = losses(run)
    assert found["list"] == found["archive"] == found["sources"]


@pytest.fixture
def damaged(material: Path, tmp_path: Path) -> Path:
    """One image missing, one damaged, one record malformed."""
    folder = tmp_path / "damaged"
    shutil.copytree(material / "images", folder / "images")
    entries = json.loads((material / "train.json").read_text())
    (folder / entries[0]["image"]).unlink()
    (folder / entries[1]["image"]).write_bytes(b"junk")
    entries[2]["conversations"] = []
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def test_bad_samples_stop_a_run_by_default(make_run: MakeRun, damaged: Path) -> None:
    with pytest.raises(UserError, match=r"record 2 .*'conversations' is empty"):
        train(make_run(data={"path": str(damaged)}))


@pytest.mark.slow
def test_a_worker_reports_a_bad_sample_as_this_process_does(make_run: MakeRun, damaged: Path) -> None:
    entries = json.loads(damaged.read_text())
    del entries[2]
    damaged.write_text(json.dumps(entries))
    (damaged.parent / entries[0]["image"]).write_bytes(b"junk")  # a missing one would be found before any worker starts
    messages = []
    for workers in (0, 1):
        with pytest.raises(UserError) as raised:
            train(make_run(f"{workers}", data={"path": str(damaged), "workers": workers}, epochs=1, max_steps=3))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert messages[0].count("\n") == 0


@pytest.mark.slow
def test_a_worker_that_is_killed_during_a_step(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, accumulate, calls = make_run(data={"workers": 1}, epochs=50, max_steps=50), trainer._accumulate, []
    others = multiprocessing.active_children()  # of earlier tests

    def killing(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 2:
            (worker,) = (each for each in multiprocessing.active_children() if each not in others)
            worker.kill()
        return accumulate(*arguments)

    monkeypatch.setattr(trainer, "_accumulate", killing)
    with pytest.raises(UserError, match=r"data\.workers: a process that loads data died \(.*\n.*saved after step 2"):
        train(run)
    assert checkpoints(run.output_path)


@pytest.mark.slow
@pytest.mark.parametrize("cache_features", [False, True])
def test_bad_samples_are_skipped_named_and_counted(make_run: MakeRun, damaged: Path, cache_features: bool) -> None:
    data = {"path": str(damaged), "bad_samples": "skip", "cache_features": cache_features}
    run = make_run("one", data=data, max_steps=3, epochs=1)  # sees every sample
    said = run_and_listen(run)
    lines = [json.loads(line) for line in (run.output_path / BAD_SAMPLES).read_text().splitlines()]
    for number in range(3):
        assert sum(f"record {number} " in line["problem"] for line in lines) >= 1
        assert f"record {number} " in said
    assert all(1 <= line["step"] <= 3 and "replaced by" in line["problem"] for line in lines)

    again = make_run("two", data=data, micro_batch_size=4, max_steps=3, epochs=1)
    train(again)
    assert (again.output_path / BAD_SAMPLES).read_text() == (run.output_path / BAD_SAMPLES).read_text()
    assert losses(again) == pytest.approx(losses(run), abs=1e-5)


def test_too_many_bad_samples(make_run: MakeRun, damaged: Path) -> None:
    run = make_run(data={"path": str(damaged), "bad_samples": "skip", "max_bad_samples": 1}, epochs=1, max_steps=3)
    with pytest.raises(UserError, match=r"bad samples were replaced, more than data.max_bad_samples \(1\)"):
        train(run)


def test_the_list_of_bad_samples(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    refuse_too_many(tmp_path, 0)
    note_bad_samples(tmp_path, 1, ["a\u2028[b]", "c"], console)
    note_bad_samples(tmp_path, 2, ["d"], console)
    assert "step 1: skipped a\u2028[b]" in console.file.getvalue()  # type: ignore[attr-defined]
    refuse_too_many(tmp_path, 3)
    with pytest.raises(UserError, match="3 bad samples were replaced, more than"):
        refuse_too_many(tmp_path, 2)
    with (tmp_path / BAD_SAMPLES).open("a") as file:
        file.write('{"step": 3, "pro')  # cut short by an interruption
    rewind_bad_samples(tmp_path, 1)
    refuse_too_many(tmp_path, 2)
    assert [json.loads(line)["step"] for line in (tmp_path / BAD_SAMPLES).read_text().splitlines()] == [1, 1]
    rewind_bad_samples(tmp_path / "absent", 0)


def test_a_large_set_is_not_read_at_start(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(damaged))
    with pytest.raises(UserError, match="record 2"):
        run_data.open_run_data(config)
    monkeypatch.setattr(run_data, "CHECKED_AT_START", 3)
    assert len(run_data.open_run_data(config).training) > 3


@pytest.mark.slow
@pytest.mark.parametrize("cache_features", [True, "auto"])
def test_features_that_do_not_fit_on_the_disk(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_features: bool | str
) -> None:
    """Asked for, they are an error before anything is computed; with 'auto' the run does without."""
    monkeypatch.setattr("llava_npu.training.data.space_left", lambda cache: 1000)
    run = make_run(data={"cache_features": cache_features}, max_steps=1)
    if cache_features == "auto":
        assert train(run).is_dir()
    else:
        with pytest.raises(UserError, match=r"data.cache_features: vision features of 24 images need .* GiB more"):
            train(run)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_kept_features_that_are_damaged_are_computed_again(tmp_path: Path) -> None:
    image, store = tmp_path / "image", FeatureStore(tmp_path / "kept")
    image.write_bytes(b"pixels")
    store.put(image, torch.zeros(1, 4, 8))
    assert image in store
    (file,) = tmp_path.rglob("*.safetensors")
    for content in (b"", file.read_bytes()[:-4], save({"other": torch.zeros(1)})):
        file.write_bytes(content)
        assert image not in store
    save_file({"features": torch.full((1, 4, 8), torch.nan)}, file)
    with pytest.raises(UserError, match=r"image: its vision features in .* were not all finite numbers"):
        store[image]
    assert image not in store
    with pytest.raises(UserError, match="image: its vision features are not all finite numbers"):
        store.put(image, torch.full((1, 4, 8), torch.inf))


@pytest.mark.parametrize("place", ["training", "validation", "archive"])
def test_a_missing_image_is_found_before_the_first_step(
    make_run: MakeRun, material: Path, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(material, folder)
    missing = folder / json.loads((folder / "train.json").read_text())[3]["image"]
    missing.unlink()
    data: dict[str, Any] = {"path": str(folder / "train.json")}
    if place == "validation":
        data = {"validation": {"path": str(folder / "train.json"), "image_root": str(folder)}}
        records = json.loads((material / "train.json").read_text())[:1]
        records[0]["conversations"][1]["value"] = "words that no other record has"
        (folder / "other.json").write_text(json.dumps(records))
        data["path"] = str(folder / "other.json")
    elif place == "archive":
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            archive.add(folder / "images", "images")
        data["image_root"] = str(tmp_path / "all.tar")
    run = make_run(data=data)
    with pytest.raises(UserError, match=rf"images? do(es)? not exist:\n.*record 3 .*{missing.name}"):
        train(run)
    assert not run.output_path.exists()


def test_missing_images_are_counted_over_chunks(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = json.loads(damaged.read_text())
    damaged.write_text(json.dumps([entry for entry in entries if entry["conversations"]]))
    data = run_data.open_run_data(DataConfig(path=str(damaged)))
    monkeypatch.setattr(run_data, "_CHUNK", 2)
    images = {path for record in data.training for path in record.image_paths}
    for image in images:
        image.unlink(missing_ok=True)  # type: ignore[attr-defined]
    count = len(images)
    with pytest.raises(UserError, match=rf"data: {count} images do not exist:(\n  .*){{5}}\n  and {count - 5} more"):
        run_data.check_images(data, "error")
    run_data.check_images(data, "skip")
