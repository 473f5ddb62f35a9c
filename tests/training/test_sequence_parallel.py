"""Two processes with a half of each sequence compute what one process does with the whole."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from llava_npu.config import RunConfig
from llava_npu.data.conversation.labels import IGNORE_INDEX
from llava_npu.errors import UserError
from llava_npu.models import compose
from llava_npu.models.proof import check_splitting
from llava_npu.training import train
from llava_npu.training.batches import SequenceSplit, micro_batch, part_of
from llava_npu.training.monitoring.metrics import read_metrics
from support import split_model, tiny
from support.small_run import in_two_processes, skip_off_the_cpu, small_run, write_material
from support.split_model import CASES, samples

MakeRun = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tower and language models with several numbers of heads."""
    folder = write_material(tmp_path_factory.mktemp("parts"))
    tiny.write_language_model(folder / "one", num_key_value_heads=1)
    tiny.write_language_model(folder / "three", num_attention_heads=6, num_key_value_heads=3)
    tiny.write_language_model(folder / "all", num_key_value_heads=4)
    words = tiny.tokenizer()
    config = tiny.text_config(len(words), sliding_window=9).to_dict()
    del config["model_type"]
    MistralForCausalLM(MistralConfig(**config)).save_pretrained(folder / "window")
    words.save_pretrained(folder / "window")
    return folder


@pytest.fixture(scope="module")
def measured(parts: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    kind = "npu" if request.config.getoption("--simulated-npu") else "cpu"
    results = tmp_path_factory.mktemp("results") / "results.json"
    command = [
        sys.executable,
        "-m",
        "llava_npu.distributed.launching",
        "2",
        split_model.__file__,
        kind,
        str(parts),
        str(results),
    ]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_are_those_of_one_device(
    measured: dict[str, Any], case: str, device: torch.device
) -> None:
    differences = measured[case]
    assert set(differences) == {"loss", "logits", "gradients"}
    assert max(differences.values()) < 1e-5, differences


RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"pack_tokens": 512},
    "fsdp2": {"pack_tokens": 512, "engine": "fsdp2"},
    "padded": {"micro_batch_size": 2},
    "fsdp2-recomputed": {"engine": "fsdp2", "micro_batch_size": 4, "gradient_checkpointing": True},
    "lora": {
        "pack_tokens": 512,
        "parts": {"language_model": {"train": "lora"}},
        "lora": {"rank": 4, "dropout": 0.0},
        "data": {"validation": {"size": 3, "every": 2}},
    },
}
if importlib.util.find_spec("deepspeed") is not None:
    RUNS |= {engine: {"pack_tokens": 512, "engine": engine} for engine in ("zero2", "zero3")}
REFERENCE = {"fsdp2": "ddp", "fsdp2-recomputed": "padded", "zero2": "ddp", "zero3": "ddp"}


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every run in two processes, and what one process makes of it."""
    kind = "npu" if request.config.getoption("--simulated-npu") else "cpu"
    if kind != "cpu" and not request.config.getoption("--exhaustive"):
        skip_off_the_cpu()
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, **changes: Any) -> RunConfig:
        return small_run(parts, folder / name, kind, **{"max_steps": 4, "batch_size": 4, **changes})

    two = {name: run(name, **changes, sequence_parallel_size=2) for name, changes in RUNS.items()}
    two["stopped"] = run("resumed", **RUNS["fsdp2"], sequence_parallel_size=2)
    two["resumed"] = run("resumed", **RUNS["ddp"])  # each process with sequences of its own
    raised = in_two_processes(folder / "processes", two, {"stopped": 2})
    assert "everything is saved" in raised.pop("stopped")
    assert not raised, raised
    for name, changes in RUNS.items():
        if name not in REFERENCE:
            train(run(f"{name}-alone", **changes))
    return folder


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_training_is_that_of_one_device(runs: Path, name: str, device: torch.device) -> None:
    alone = runs / f"{'ddp' if name == 'resumed' else REFERENCE.get(name, name)}-alone"
    lines, expected = read_metrics(runs / name), read_metrics(alone)
    for key in ("loss", "grad_norm", "validation_loss"):
        values, same = ([line[key] for line in each if line.get(key) is not None] for each in (lines, expected))
        assert values == pytest.approx(same, rel=1e-5)
        assert len(values) == (4 if key != "validation_loss" else 2 if name == "lora" else 0)
    for key in ("tokens", "supervised_tokens", "samples"):  # each counted once
        assert [line[key] for line in lines] == [line[key] for line in expected]
    files = (next((folder / "model").glob("*.safetensors")) for folder in (runs / name, alone))
    weights, others = map(load_file, files)
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        assert float((weight - others[key]).abs().max()) < 1e-5, key


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize(("pack_length", "anyres"), [(300, False), (None, False), (300, True)])
def test_parts_make_the_whole(parts: Path, number: int, pack_length: int | None, anyres: bool) -> None:
    options = {"image_aspect_ratio": "anyres"} if anyres else {}
    _, processor = compose(str(parts / "clip"), str(parts / "lm"), **options)  # type: ignore[arg-type]
    whole = micro_batch(samples(processor), pack_length, 0, processor.image_token_id, multiple=number)
    split = [part_of(whole, SequenceSplit(index, number), processor) for index in range(number)]
    rows, length = whole.tensors["input_ids"].shape
    size = length // number
    assert length % number == 0
    for name in ("input_ids", "position_ids", "attention_mask"):
        assert torch.equal(torch.cat([each.tensors[name] for each in split], 1), whole.tensors[name])
    assert sum(each.tokens for each in split) == whole.tokens
    assert sum(each.supervised_tokens for each in split) == whole.supervised_tokens
    assert all(each.sequence_lengths == whole.sequence_lengths for each in split)
    targets = torch.full((rows, length), IGNORE_INDEX)
    marks = torch.zeros(rows, length, dtype=torch.long)  # 1 + the image's token that stands there
    for index, each in enumerate(split):
        shifted = each.tensors["labels"][:, 1:]
        chosen = each.tensors["supervised_positions"]
        flat = torch.full((shifted.numel(),), IGNORE_INDEX)
        flat[chosen] = shifted.flatten()[chosen]
        targets[:, index * size : index * size + shifted.shape[1]] = flat.view_as(shifted)
        if each.images:
            per_image = [processor.num_image_tokens] * each.images
            if each.image_sizes is not None:
                per_image = [processor.count_image_tokens(size) for size in each.image_sizes]
                assert each.images == sum(processor.tiling.num_tiles(size) for size in each.image_sizes)
            assert int(each.tensors["image_tokens"].max()) < sum(per_image)
            part = torch.zeros(rows * size, dtype=torch.long)
            part[each.tensors["image_positions"]] = 1
            marks[:, index * size : (index + 1) * size] += part.view(rows, size)
    assert torch.equal(targets[:, :-1], whole.tensors["labels"][:, 1:])
    assert torch.equal(marks, (whole.tensors["input_ids"] == processor.image_token_id).long())


def test_what_cannot_be_split_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"sequence_parallel_size: 2 does not divide the number of devices, 1\."):
        train(make_run(sequence_parallel_size=2))
    with pytest.raises(UserError, match=r"3 does not divide the language model's 4 attention heads; use 1, 2, 4\."):
        train(make_run(sequence_parallel_size=3))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UserError, match="rotary embedding of type 'dynamic' depends on the longest position"):
        check_splitting(tiny.text_config(rope_parameters=rope), 2)
    with pytest.raises(ValueError, match="`compile` has not been tried with `sequence_parallel_size`"):
        make_run(sequence_parallel_size=2, compile="aot_eager")
