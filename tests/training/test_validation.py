"""The loss on samples that are held out."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.config.loading import validate
from llava_npu.data.conversation.turns import Turn
from llava_npu.data.dataset import ConversationDataset, collate
from llava_npu.data.formats.parsing import Record, parse_record
from llava_npu.data.holdout import content_ids, hold_out, leave_out
from llava_npu.data.image_roots import ImageFolder
from llava_npu.data.mixtures import Mixture, MixturePart
from llava_npu.data.records import load_records
from llava_npu.models import load
from llava_npu.training import train
from llava_npu.training.checkpointing.checkpoints import checkpoints
from llava_npu.training.data import open_run_data
from llava_npu.training.monitoring.metrics import read_metrics
from support.crashed_run import crash_after

MakeRun = Callable[..., RunConfig]


def _column(run: RunConfig, name: str) -> list[Any]:
    return [line[name] for line in read_metrics(run.output_path)]


@pytest.fixture
def five(material: Path, tmp_path: Path) -> str:
    """Five records, text alone among them: no whole number of micro-batches. None of them is trained on."""
    shutil.copytree(material / "images", tmp_path / "images")
    entries = json.loads((material / "train.json").read_text())[-5:]
    for entry in entries:
        entry["conversations"][-1]["value"] += " Indeed."
    (tmp_path / "five.json").write_text(json.dumps(entries))
    return str(tmp_path / "five.json")


@pytest.mark.slow
def test_the_loss_is_that_of_transformers(make_run: MakeRun, five: str) -> None:
    """Reference: the mean that transformers gives for all samples in one batch, on the final model."""
    run = make_run(data={"validation": {"path": five, "every": 2}}, max_steps=5, micro_batch_size=4)
    train(run)
    losses = _column(run, "validation_loss")
    assert [loss is not None for loss in losses] == [False, True, False, True, True]
    model, processor = load(run.output_path)
    dataset = ConversationDataset(load_records(five), processor)
    batch = collate([dataset[index] for index in range(5)], processor.tokenizer.pad_token_id)
    assert losses[-1] == pytest.approx(model(**batch).loss.item(), abs=1e-5)


@pytest.mark.slow
def test_a_run_that_validates_trains_as_one_that_does_not(make_run: MakeRun, five: str) -> None:
    """Dropout would show it if the random state moved."""
    lora = {"parts": {"language_model": {"train": "lora"}}, "lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}
    plain = make_run("plain", **lora)
    validating = make_run("validating", **lora, data={"validation": {"path": five, "every": 1}})
    train(plain)
    train(validating)
    assert _column(validating, "loss") == _column(plain, "loss")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(make_run: MakeRun) -> None:
    data = {"validation": {"size": 4, "every": 3}}
    whole = make_run("whole", data=data, save_every=2)
    cut = make_run("cut", data=data, save_every=2)
    train(whole)
    crash_after(cut, 3)
    train(cut)
    for name in ("loss", "validation_loss"):
        assert _column(cut, name) == _column(whole, name)


@pytest.mark.slow
def test_a_step_is_saved_before_its_validation(make_run: MakeRun) -> None:
    """An image that goes bad among what is held out loses nothing, and the validation is made up for."""
    changes = {"data": {"validation": {"size": 4, "every": 3}}, "save_every": 3}
    whole, cut = make_run("whole", **changes), make_run("cut", **changes)
    train(whole)
    for saved in (3, 6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llava_npu.training.monitoring.monitor.validation_loss", _fail)
            if saved == 6:  # the validation after step 3 is made up for first, and passes
                patch.setattr("llava_npu.training.monitoring.monitor.Monitor.misses_validation", lambda *_: False)
            with pytest.raises(UserError, match="went bad"):
                train(cut)
        assert checkpoints(cut.output_path)[0].step == saved
        assert _column(cut, "loss") == _column(whole, "loss")[:saved]
    train(cut)
    assert _column(cut, "validation_loss")[-1] == _column(whole, "validation_loss")[-1]


def _fail(*arguments: Any, **options: Any) -> float:
    raise UserError("an image went bad")


@pytest.mark.slow
def test_links_lead_to_the_newest_checkpoint_and_to_the_best(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("llava_npu.training.monitoring.monitor.validation_loss", lambda *_, **__: next(losses))
    data = {"validation": {"size": 4, "every": 2}}
    run = make_run(data=data, save_every=2, keep_checkpoints=1, async_checkpoints=True)
    crash_after(run, 5)
    links = run.output_path / "checkpoints"
    assert (links / "latest").resolve() == run.output_path / "checkpoint-000004"
    assert (links / "best").resolve() == run.output_path / "checkpoint-000002"
    console = Console(file=io.StringIO(), width=300)
    train(run, console=console)
    assert [path.name for path in links.iterdir()] == ["best"]
    assert [each.step for each in checkpoints(run.output_path)] == [2]
    assert "lowest after step 2" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_cached_features_serve_it_too(
    make_run: MakeRun, five: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    data = {"validation": {"path": five, "every": 2}}
    plain, cached = make_run("plain", data=data), make_run("cached", data={**data, "cache_features": True})
    train(plain)
    train(cached)
    found, expected = ([x for x in _column(run, "validation_loss") if x is not None] for run in (cached, plain))
    assert found == pytest.approx(expected, abs=1e-5)


# ---- what is held out ----


@pytest.mark.parametrize("validation", [{"size": 5}, {"fraction": 0.2}])
def test_no_record_is_in_both(material: Path, validation: dict[str, Any]) -> None:
    values = {
        "output": "x",
        "stage": "finetune",
        "model": {"checkpoint": "x"},
        "data": {"path": str(material / "train.json"), "validation": validation},
    }
    data = open_run_data(validate(RunConfig, values, "test").data)
    assert data.validation is not None
    held, left = ({record.name for record in records} for records in (data.validation, data.training))
    assert len(held) == len(data.validation) == 5
    assert not held & left
    assert len(held | left) == 26
    again = open_run_data(validate(RunConfig, values, "test").data)
    assert again.validation is not None
    assert [record.name for record in again.validation] == [record.name for record in data.validation]


def records(*names: str, folder: Path = Path(), image: str | None = None) -> list[Record]:
    """Records whose answer is their name; the origin tells where each comes from."""
    return [
        Record(
            id=str(number),
            conversations=(Turn("human", "What?"), Turn("gpt", name)),
            images=(image or f"{name}.png",) if folder != Path() else (),
            origin=f"{folder}:{number}:{name}",
            image_root=ImageFolder(folder),
        )
        for number, name in enumerate(names)
    ]


def answers(samples: Sequence[Record]) -> list[str]:
    return [record.conversations[1].text for record in samples]


def test_a_record_that_a_mixture_repeats_is_held_out_as_a_whole() -> None:
    first, second = (
        records(*(f"{letter}{number}" for number in range(count))) for letter, count in (("a", 6), ("b", 4))
    )
    mixture = Mixture([MixturePart(first, 2.5), MixturePart(second, 1.0, limit=3)])
    left, held = (answers(part) for part in hold_out(mixture, size=4))
    assert len(held) == len(set(held)) == 4
    assert not set(held) & set(left)
    assert sorted([*left, *(name for name in answers(mixture) if name in set(held))]) == sorted(answers(mixture))


def test_what_is_held_out_is_not_trained_on_under_another_source() -> None:
    """The same records in two sources, and one of them twice in a file: fractions are of distinct records."""
    names = [f"a{number}" for number in range(8)]
    mixture = Mixture([MixturePart(records(*names, names[0])), MixturePart(records(*names), 2.0)])
    for chosen in ({"size": 4}, {"fraction": 0.5}):
        left, held = (answers(part) for part in hold_out(mixture, **chosen))
        assert len(held) == len(set(held)) == 4
        assert not set(held) & set(left)
        assert set(held) | set(left) == set(names)


def test_what_training_does_not_tell_apart_is_not_told_apart() -> None:
    folder = ImageFolder(Path("images"))

    def one(question: str, **answer: Any) -> Record:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}]
        more = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So.", **answer}]
        return parse_record({"image": "a.png", "conversations": [*turns, *more]}, 0, "x:record 0", folder)

    train = [one("<image>\nWhat?"), one("What?\n<image>"), one("<image>\n What? "), one("<image>\nWhat?", loss=False)]
    assert content_ids(train)[0].tolist() == [0] * 4
    assert content_ids([*train, one("<image>\nWho?")])[0].tolist() == [0, 0, 0, 0, 4]


def test_equal_questions_about_other_images_are_other_records(tmp_path: Path) -> None:
    for folder, content in (("one", b"1"), ("copy", b"1"), ("two", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.png").write_bytes(content)
    one, copy, two = (records("a", folder=tmp_path / name, image=f"{name}.png") for name in ("one", "copy", "two"))
    assert [list(ids) for ids in content_ids([*one, *two, *one], copy)] == [[0, 1, 0], [0]]
    assert leave_out([*one, *two], copy)[:] == two
    gone = records("a", folder=tmp_path, image="missing.png")
    assert [list(ids) for ids in content_ids([*one, *gone])] == [[0, 1]]


def test_validation_data_that_is_the_training_data_is_refused(material: Path, make_run: MakeRun) -> None:
    path = str(material / "train.json")
    config = make_run(data={"path": path, "validation": {"path": path}}).data
    with pytest.raises(UserError, match=r"data\.validation\.path: it holds every record of the training data"):
        open_run_data(config)


@pytest.mark.slow
def test_validation_data_within_the_training_data_is_left_out(
    material: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    entries = json.loads((material / "train.json").read_text())
    (tmp_path / "part.json").write_text(json.dumps(entries[:3]))
    data = {"image_root": str(material), "validation": {"path": str(tmp_path / "part.json")}}
    opened = open_run_data(make_run(data={"path": str(material / "train.json"), **data}).data)
    assert opened.validation is not None
    assert opened.left_out == len(entries) - len(opened.training) >= 3
    held = {repr((record.conversations, record.images)) for record in opened.validation}
    assert not held & {repr((record.conversations, record.images)) for record in opened.training}
    run = make_run(data={"path": str(material / "train.json"), **data}, max_steps=1)
    console = Console(file=io.StringIO(), width=200)
    train(run, console=console)
    assert "samples are not trained on: they are in data.validation.path too" in console.file.getvalue()  # type: ignore[attr-defined]


def test_all_records_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match="6 of 6 distinct records would be held out; hold out at least one, and leave"):
        hold_out(records(*"abcdef", "a"), size=6)


def test_one_way_only() -> None:
    values = {"output": "x", "stage": "align", "model": {"checkpoint": "x"}}
    for validation in ({}, {"size": 3, "fraction": 0.1}):
        with pytest.raises(UserError, match="set exactly one of `path`, `fraction` and `size`"):
            validate(RunConfig, {**values, "data": {"path": "x", "validation": validation}}, "run.yaml")


def test_a_subset_reads_what_it_is_asked_for() -> None:
    left, held = hold_out(records(*map(str, range(10))), size=3)
    assert [*left[1:3]] == [left[1], left[2]]
    assert np.unique(answers([*left, *held])).size == 10
    assert torch.is_tensor(torch.tensor(len(held)))
