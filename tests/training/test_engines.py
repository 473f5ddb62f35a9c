"""Every engine in two processes computes what one process does, whatever the batches hold, and reads the others' state.

All runs of a device go through the same two processes, one after the other; the tests look at what they left.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_npu.config import RunConfig, render_config
from llava_npu.data.plan import PaddedLayout, Plan
from llava_npu.data.records import load_records
from llava_npu.training import train
from llava_npu.training.monitoring.metrics import read_metrics
from support.small_run import in_two_processes, skip_off_the_cpu, small_run

# Batches of one sample: in the fourth step one is of text alone, beside one with an image in the other process.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2", "async_checkpoints": True},
    "fsdp2-hybrid": {"engine": "fsdp2", "engine_options": {"shard_group": 1}},
    "fsdp2-offload": {"engine": "fsdp2", "engine_options": {"offload": True}, "gradient_checkpointing": True},
    "zero2": {"engine": "zero2"},
    "zero2-offload": {"engine": "zero2", "engine_options": {"offload_optimizer": True}},
    "zero3": {"engine": "zero3"},
    "zero3-offload": {
        "engine": "zero3",
        "engine_options": {"offload_optimizer": True, "offload_parameters": True},
        "gradient_checkpointing": True,
    },
}
SHARDING = ["fsdp2", "zero3"]
STOPPED = "RunStopped: stopped after step {}, everything is saved; the same command resumes."
RELAY = ["ddp", "fsdp2-offload", "zero2", "zero3-offload"]  # each goes on with what the one before has saved
RESUMED = ["zero3-offload"]
ALSO_RESUMED = ["fsdp2", "fsdp2-offload", "zero2-offload", "zero3"]
VARIANTS: dict[str, dict[str, Any]] = {
    "towers-anyres-flat-lora": {
        "model": {
            "vision_tower": ["clip", "siglip"],
            "tower_fusion": "interleave",
            "image_aspect_ratio": "anyres",
            "projector": "resampler",
            "projector_options": {"num_queries": 4},
        },
        "parts": {"language_model": {"train": "lora"}, "vision_tower": {"train": "lora"}},
        "lora": {"rank": 4, "dropout": 0.0},
    },
}
MORE_VARIANTS: dict[str, dict[str, Any]] = {
    "resampler": {"model": {"projector": "resampler", "projector_options": {"num_queries": 4}}},
    "tokenpacker": {
        "model": {
            "projector": "tokenpacker",
            "projector_options": {"scale_factor": 2, "region_layers": [1, 2], "num_heads": 4},
        }
    },
    "lora": {
        "parts": {"language_model": {"train": "lora"}, "vision_tower": {"train": "lora"}},
        "lora": {"rank": 4, "dropout": 0.0},
    },
    "towers-sva": {
        "model": {
            "vision_tower": ["clip", "siglip"],
            "projector": "sva",
            "projector_options": {"num_queries": 4, "hidden_size": 16, "num_heads": 2},
        },
        "data": {"cache_features": True},
    },
    # Images of several shapes: the processes have other numbers of tiles and of tokens.
    "anyres": {"model": {"image_aspect_ratio": "anyres"}, "gradient_checkpointing": True},
}


def _some(always: Iterable[str], more: Iterable[str]) -> list[Any]:
    return [*always, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in more)]


def _is_there(engine: str) -> bool:
    return not engine.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


def _need(engine: str) -> None:
    if not _is_there(engine):
        pytest.skip("DeepSpeed is not installed")


class Runs:
    """The runs of one device: reference runs in this process, the others in two."""

    def __init__(self, material: Path, folder: Path, device_type: str, exhaustive: bool):
        def run(name: str, **changes: Any) -> RunConfig:
            return small_run(material, folder / name, device_type, **{"max_steps": 5, "batch_size": 4, **changes})

        self.folder, self.device_type = folder, device_type
        shapes = {"data": {"path": str(_write_shapes(material, folder / "shapes"))}}
        wanted = VARIANTS | MORE_VARIANTS if exhaustive else VARIANTS if device_type == "cpu" else {}
        variants = {name: {**changes, **(shapes if "anyres" in name else {})} for name, changes in wanted.items()}
        for name, changes in variants.items():
            if "towers" in name:
                towers = [str(material / tower) for tower in changes["model"]["vision_tower"]]
                variants[name] = {**changes, "model": {**changes["model"], "vision_tower": towers}}
        engines = {name: options for name, options in ENGINES.items() if _is_there(options["engine"])}
        two = {name: run(name, micro_batch_size=1, **options) for name, options in engines.items()}
        stop_after = {}
        resumed = RESUMED + ALSO_RESUMED if exhaustive else RESUMED if device_type == "cpu" else []
        for name in filter(engines.__contains__, resumed):
            two[f"{name}-stopped"] = run(f"{name}-resumed", micro_batch_size=1, **engines[name])
            two[f"{name}-resumed"] = two[f"{name}-stopped"]
            stop_after[f"{name}-stopped"] = 2
        for step, name in enumerate(filter(engines.__contains__, RELAY), start=1):
            two[f"relay-{name}"] = run("relay", micro_batch_size=2, **engines[name])
            stop_after[f"relay-{name}"] = step
        for engine in filter(_is_there, SHARDING):
            for name, changes in variants.items():
                two[f"{engine}-{name}"] = run(f"{engine}-{name}", micro_batch_size=1, engine=engine, **changes)
            two[f"{engine}-bf16"] = run(f"{engine}-bf16", engine=engine, micro_batch_size=2, precision="bf16")
        half = {"micro_batch_size": 2, "precision": "fp16", "engine_options": {"offload": True}}
        two["fsdp2-fp16"] = run("fsdp2-fp16", engine="fsdp2", **half)
        self.raised = in_two_processes(folder / "processes", two, stop_after)
        self.stopped = {name: self.raised.pop(name, "it finished") for name in stop_after}
        for name, changes in {
            "one": {},
            "accumulated": {"micro_batch_size": 2},
            "bf16": {"precision": "bf16"},
            "fp16": {"precision": "fp16"},
            "relay": {},
            **variants,
        }.items():
            train(run(name, **changes))

    def losses(self, name: str) -> list[float]:
        assert name not in self.raised, self.raised[name]
        if self.device_type != "cpu" and not (self.folder / name).is_dir():
            skip_off_the_cpu()
        return [line["loss"] for line in read_metrics(self.folder / name)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(next((self.folder / name / "model").glob("*.safetensors")))

    def assert_equal(self, name: str, reference: str, tolerance: float = 1e-5) -> None:
        assert self.losses(name) == pytest.approx(self.losses(reference), abs=tolerance)
        weights, expected = self.weights(name), self.weights(reference)
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, atol=tolerance, rtol=0, msg=key)


def _write_shapes(material: Path, folder: Path) -> Path:
    """The records with their images in shapes that are cut into two, three and four tiles, beside the whole one."""
    records = json.loads((material / "train.json").read_text())
    (folder / "images").mkdir(parents=True)
    for number, path in enumerate(sorted((material / "images").iterdir())):
        with Image.open(path) as picture:
            picture.resize(((56, 28), (56, 56), (20, 80))[number % 3]).save(folder / "images" / path.name)
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


@pytest.fixture(scope="module")
def _runs() -> dict[str, Runs]:
    return {}


@pytest.fixture
def runs(
    _runs: dict[str, Runs],
    material: Path,
    device: torch.device,
    exhaustive: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    if device.type not in _runs:
        _runs[device.type] = Runs(material, tmp_path_factory.mktemp(device.type), device.type, exhaustive)
    return _runs[device.type]


def test_text_alone_stands_beside_an_image(material: Path) -> None:
    records = load_records(material / "train.json")
    layout = PaddedLayout(Plan(len(records), 4), num_processes=2, micro_batch_size=1)
    pairs = [list(zip(*(layout.share(step, rank) for rank in range(2)), strict=True)) for step in range(5)]
    seen = [[bool(records[int(sample[0])].image_paths) for sample in pair] for step in pairs for pair in step]
    assert [False, True] in seen


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(runs: Runs, engine: str) -> None:
    _need(engine)
    runs.assert_equal("accumulated", "one")
    runs.assert_equal(engine, "one")


@pytest.mark.slow
@pytest.mark.parametrize("variant", _some(VARIANTS, MORE_VARIANTS))
@pytest.mark.parametrize("engine", SHARDING)
def test_projectors_and_adapters_in_shards(runs: Runs, engine: str, variant: str) -> None:
    _need(engine)
    runs.assert_equal(f"{engine}-{variant}", variant)


@pytest.mark.slow
@pytest.mark.parametrize("engine", _some(RESUMED, ALSO_RESUMED))
def test_a_stopped_run_goes_on_bit_for_bit(runs: Runs, engine: str) -> None:
    _need(engine)
    runs.assert_equal(f"{engine}-resumed", engine, tolerance=0)
    assert runs.stopped[f"{engine}-stopped"] == STOPPED.format(2)


@pytest.mark.slow
def test_every_engine_goes_on_from_every_other(runs: Runs) -> None:
    """One step with each in two processes, the last one in one process."""
    said = [text for name, text in runs.stopped.items() if name.startswith("relay")]
    assert said == [STOPPED.format(step) for step in range(1, len(said) + 1)]
    runs.assert_equal("relay", "one")


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDING)
def test_sixteen_bits_in_shards(runs: Runs, engine: str) -> None:
    """Shards compute in bfloat16 throughout, one process under autocast: close, not equal."""
    _need(engine)
    assert runs.losses(f"{engine}-bf16") == pytest.approx(runs.losses("bf16"), abs=0.05)
    frozen = [name for name in runs.weights("one") if "vision_tower" in name]
    assert frozen
    assert all(torch.equal(runs.weights(f"{engine}-bf16")[name], runs.weights("one")[name]) for name in frozen)


@pytest.mark.slow
def test_float16_in_shards_in_the_hosts_memory(runs: Runs) -> None:
    """Whose loss is scaled on the device, and whose gradients are divided on the host."""
    assert runs.losses("fsdp2-fp16") == pytest.approx(runs.losses("fp16"), abs=0.02)


def test_zero3_in_a_process_that_nobody_launched(material: Path, tmp_path: Path) -> None:
    """DeepSpeed reads LOCAL_RANK, which only launchers set, while it trains."""
    _need("zero3")
    run = small_run(material, tmp_path / "run", "cpu", engine="zero3", max_steps=2)
    (tmp_path / "run.yaml").write_text(render_config(run))
    command = [sys.executable, "-m", "llava_npu", "train", str(tmp_path / "run.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(run.output_path)) == 2
