"""Weights that stay in their files until an engine takes them: the same numbers, one copy for all processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_npu import UserError
from llava_npu.config import RunConfig
from llava_npu.models import vocabulary
from llava_npu.models.loaded import LoadedModel
from llava_npu.models.loading import load, open_source
from llava_npu.models.sources import ModelSource
from llava_npu.training import train
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.parts import kept_types, part_of, place_weights, prepare_parts
from llava_npu.training.trainer import Trainer
from support import tiny

MakeRun = Callable[..., RunConfig]
CPU = torch.device("cpu", 0)  # as accelerate names it in a launch
LORA = {"parts": {"language_model": {"train": "lora"}, "vision_tower": {"train": "full"}}}
COMPOSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "tables": {"model": {"projector": "resampler", "projector_options": {"num_queries": 4}}},
    "resized": {"model": {"image_size": 56}},
    "anyres": {"model": {"image_aspect_ratio": "anyres"}},
    "lora": {**LORA, "lora": {"rank": 4}},
    "dora": {**LORA, "lora": {"rank": 4, "use_dora": True}},
}


def _from_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is that of a file of weights."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith((".safetensors", ".bin"))
    return False


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _assert_equal(mapped: nn.Module, copied: nn.Module) -> None:
    ours, theirs = _tensors(mapped), _tensors(copied)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower in float32 and a language model in bfloat16."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny.write_language_model(folder / "lm", dtype=torch.bfloat16)
    tiny.write_clip(folder / "clip")
    return folder


def _both(run: RunConfig) -> tuple[LoadedModel, LoadedModel]:
    """The run's model, mapped and as a float32 copy, prepared and placed; what is drawn afterwards is the same too."""
    built = []
    for mapped in (True, False):
        torch.manual_seed(3)
        loaded = build_model(run, mapped=mapped)
        prepare_parts(loaded.model, run.resolved_parts, torch.bfloat16, False, run.lora)
        built.append((loaded, torch.rand(1)))
    assert built[0][1] == built[1][1]
    for loaded, _ in built:
        place_weights(loaded.model, CPU, kept_types(loaded.model, torch.bfloat16))
    return built[0][0], built[1][0]


@pytest.mark.parametrize("kind", COMPOSED)
def test_a_composed_model_is_the_same(make_run: MakeRun, mixed: Path, kind: str) -> None:
    parts = {"vision_tower": str(mixed / "clip"), "language_model": str(mixed / "lm")}
    changes = COMPOSED[kind]
    run = make_run(**{**changes, "model": {**parts, **changes.get("model", {})}})
    mapped, copied = _both(run)
    _assert_equal(mapped.model, copied.model)
    assert mapped.model.config.to_dict() == copied.model.config.to_dict()
    assert mapped.model.generation_config.to_dict() == copied.model.generation_config.to_dict()


@pytest.mark.parametrize("tied", [False, True])
def test_an_enlarged_vocabulary_is_made_once_for_all_processes(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    tiny.write_language_model(tmp_path / "lm", dtype=torch.bfloat16, tie_word_embeddings=tied)
    run = make_run(model={"language_model": str(tmp_path / "lm")}, stage="align")
    monkeypatch.setattr(vocabulary, "_SMALL", 0)
    made = []
    monkeypatch.setattr(
        vocabulary, "enlarge_vocabulary", lambda *args, own=vocabulary.enlarge_vocabulary: made.append(own(*args))
    )
    _assert_equal(*(each.model for each in _both(run)))
    del made[:]
    mapped = build_model(run, mapped=True).model  # as another process does
    assert not made
    model, embedding = mapped.model, mapped.get_input_embeddings().weight
    assert (mapped.get_output_embeddings().weight is embedding) == tied
    assert embedding.dtype == torch.float32
    read = [*model.vision_tower.parameters(), *model.language_model.parameters(), mapped.get_output_embeddings().weight]
    assert all(map(_from_file, read))


def test_frozen_weights_stay_in_their_files_and_trained_ones_leave_them(make_run: MakeRun, mixed: Path) -> None:
    parts = {"vision_tower": str(mixed / "clip"), "language_model": str(mixed / "lm")}
    run = make_run(model=parts, parts={"vision_tower": {"train": "full"}, "language_model": {"train": "frozen"}})
    model = build_model(run, mapped=True).model
    prepare_parts(model, run.resolved_parts, torch.bfloat16, False)
    place_weights(model, CPU, kept_types(model, torch.bfloat16))
    before = {path: path.read_bytes() for path in mixed.rglob("*.safetensors")}
    for name, parameter in model.named_parameters():
        if part_of(name) == "language_model" and "embed_tokens" not in name:  # that was enlarged
            assert _from_file(parameter), name
        if parameter.requires_grad:
            assert not _from_file(parameter), name
            parameter.data.add_(1)
    assert {path: path.read_bytes() for path in mixed.rglob("*.safetensors")} == before


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_checkpoint_is_the_same(make_run: MakeRun, mixed: Path, tmp_path: Path, layout: str) -> None:
    parts = {"vision_tower": str(mixed / "clip"), "language_model": str(mixed / "lm"), "projector": "resampler"}
    loaded = build_model(make_run(model={**parts, "projector_options": {"num_queries": 4}}))
    loaded.model.model.language_model.bfloat16()
    loaded.save_pretrained(tmp_path / "model")
    if layout == "bin":
        file = tmp_path / "model/model.safetensors"
        torch.save(load_file(file), tmp_path / "model/pytorch_model.bin")
        file.unlink()
    mapped, copied = (
        open_source(ModelSource(checkpoint=str(tmp_path / "model")), dtype, mapped=dtype is None).model
        for dtype in (None, torch.float32)
    )
    assert all(map(_from_file, mapped.parameters()))
    assert {parameter.dtype for parameter in mapped.parameters()} == {torch.bfloat16, torch.float32}
    place_weights(mapped, CPU, kept_types(mapped, None))
    _assert_equal(mapped, copied)


def test_merged_adapters_are_shared_too(make_run: MakeRun) -> None:
    run = make_run(parts={"language_model": {"train": "lora"}}, lora={"rank": 4}, max_steps=1)
    folder = str(train(run))
    mapped, copied = load(folder, mapped=True).model, load(folder, dtype=torch.float32).model
    assert all(map(_from_file, mapped.parameters()))
    _assert_equal(mapped.requires_grad_(False), copied)  # as merging leaves it; a run sets what it trains


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_files_that_change_while_a_run_trains(make_run: MakeRun, mixed: Path, tmp_path: Path, precision: str) -> None:
    """One that is replaced changes nothing; one that is written to ends the run."""
    material = tmp_path / "material"
    shutil.copytree(mixed, material)
    parts = {"vision_tower": str(material / "clip"), "language_model": str(material / "lm")}
    frozen, file = "language_model.model.norm.weight", material / "lm/model.safetensors"

    def run(name: str) -> RunConfig:
        return make_run(name, model=parts, stage="align", precision=precision, max_steps=2)

    def change_after_the_first_step(name: str, change: Callable[[], None]) -> dict[str, torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            own = Trainer.train_step
            patch.setattr(
                Trainer, "train_step", lambda self, step, batches: (own(self, step, batches), step or change())
            )
            return load_file(train(run(name)) / "model.safetensors")

    def replace() -> None:
        values = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(values, tmp_path / "other.safetensors", metadata={"format": "pt"})
        (tmp_path / "other.safetensors").replace(file)

    expected = change_after_the_first_step("untouched", lambda: None)
    assert expected[frozen].any()
    replaced = change_after_the_first_step("replaced", replace)
    assert all(torch.equal(replaced[name], tensor) for name, tensor in expected.items())
    shutil.copy(mixed / "lm/model.safetensors", file)
    with pytest.raises(UserError, match=r"model\.safetensors: was written to since .*\nAll is saved after step 2"):
        change_after_the_first_step("written", lambda: os.utime(file))
