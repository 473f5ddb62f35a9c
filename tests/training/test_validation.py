"""The loss on samples that are held out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashed_run import crash_after

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.config.loading import validate
from llava_npu.data.dataset import ConversationDataset, collate
from llava_npu.data.holdout import hold_out
from llava_npu.data.mixtures import Mixture, Part
from llava_npu.data.records import load_records
from llava_npu.models import load
from llava_npu.training import train
from llava_npu.training.data import open_run_data
from llava_npu.training.monitoring.metrics import read_metrics

MakeRun = Callable[..., RunConfig]


def _column(run: RunConfig, name: str) -> list[Any]:
    return [line[name] for line in read_metrics(run.output_path)]


@pytest.fixture
def five(material: Path, tmp_path: Path) -> str:
    """Five records, text alone among them: no whole number of micro-batches."""
    shutil.copytree(material / "images", tmp_path / "images")
    records = json.loads((material / "train.json").read_text())
    (tmp_path / "five.json").write_text(json.dumps(records[-5:]))
    return str(tmp_path / "five.json")


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


def test_a_run_that_validates_trains_as_one_that_does_not(make_run: MakeRun, five: str) -> None:
    """Dropout would show it if the random state moved."""
    lora = {"parts": {"language_model": {"train": "lora"}}, "lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}
    plain = make_run("plain", **lora)
    validating = make_run("validating", **lora, data={"validation": {"path": five, "every": 1}})
    train(plain)
    train(validating)
    assert _column(validating, "loss") == _column(plain, "loss")


def test_an_interrupted_run_goes_on_bit_for_bit(make_run: MakeRun) -> None:
    data = {"validation": {"size": 4, "every": 3}}
    whole = make_run("whole", data=data, save_every=2)
    cut = make_run("cut", data=data, save_every=2)
    train(whole)
    crash_after(cut, 3)
    train(cut)
    for name in ("loss", "validation_loss"):
        assert _column(cut, name) == _column(whole, name)


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


def test_a_record_that_a_mixture_repeats_is_held_out_as_a_whole() -> None:
    first, second = [f"a{number}" for number in range(6)], [f"b{number}" for number in range(4)]
    mixture = Mixture([Part(first, 2.5), Part(second, 1.0, limit=3)])  # type: ignore[arg-type]
    left, held = hold_out(mixture, 4)
    assert len(held) == len(set(held)) == 4
    assert not set(held) & set(left)
    assert sorted([*left, *(name for name in mixture if name in set(held))]) == sorted(mixture)


def test_all_records_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match="6 of 6 records are to be held out; at least one, and not all"):
        hold_out([f"{number}" for number in range(6)], 6)  # type: ignore[arg-type]


def test_one_way_only() -> None:
    values = {"output": "x", "stage": "align", "model": {"checkpoint": "x"}}
    for validation in ({}, {"size": 3, "fraction": 0.1}):
        with pytest.raises(UserError, match="give `path`, `fraction` or `size`: one of the three"):
            validate(RunConfig, {**values, "data": {"path": "x", "validation": validation}}, "run.yaml")


def test_a_subset_reads_what_it_is_asked_for() -> None:
    left, held = hold_out([f"{number}" for number in range(10)], 3)  # type: ignore[arg-type]
    assert [*left[1:3]] == [left[1], left[2]]
    assert np.unique([*left, *held]).size == 10
    assert torch.is_tensor(torch.tensor(len(held)))
