"""Every engine in two processes computes what one process does, whatever the batches hold, and reads the others' state.

All runs of a device go through the same two processes, one after the other; the tests look at what they left.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_npu.config import RunConfig
from llava_npu.training import train
from llava_npu.training.metrics import read_metrics
from small_run import in_two_processes, small_run

# Batches of one sample: some are of text alone in one process and of images in the other.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2"},
    "fsdp2-hybrid": {"engine": "fsdp2", "fsdp2": {"shard_group": 1}},
    "fsdp2-offload": {"engine": "fsdp2", "fsdp2": {"offload": True}, "gradient_checkpointing": True},
    "zero2": {"engine": "zero2"},
    "zero2-offload": {"engine": "zero2", "zero": {"offload_optimizer": True}},
    "zero3": {"engine": "zero3"},
    "zero3-offload": {
        "engine": "zero3",
        "zero": {"offload_optimizer": True, "offload_parameters": True},
        "gradient_checkpointing": True,
    },
}
SHARDING = ["fsdp2", "zero3"]
PROJECTORS: dict[str, dict[str, Any]] = {
    "resampler": {"projector": "resampler", "projector_options": {"num_queries": 4}},
    "tokenpacker": {
        "projector": "tokenpacker",
        "projector_options": {"scale_factor": 2, "region_layers": [1, 2], "num_heads": 4},
    },
}


def _is_there(engine: str) -> bool:
    return not engine.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


def _need(engine: str) -> None:
    if not _is_there(engine):
        pytest.skip("DeepSpeed is not installed")


class Runs:
    """The runs of one device: reference runs in this process, the others in two."""

    def __init__(self, material: Path, folder: Path, device_type: str):
        def run(name: str, **changes: Any) -> RunConfig:
            return small_run(material, folder / name, device_type, **{"max_steps": 5, **changes})

        self.folder = folder
        engines = {name: options for name, options in ENGINES.items() if _is_there(options["engine"])}
        two = {name: run(name, micro_batch_size=1, **options) for name, options in engines.items()}
        for engine in filter(_is_there, SHARDING):
            for name, model in PROJECTORS.items():
                two[f"{engine}-{name}"] = run(f"{engine}-{name}", micro_batch_size=1, engine=engine, model=model)
            two[f"{engine}-bf16"] = run(f"{engine}-bf16", engine=engine, micro_batch_size=4, precision="bf16")
        self.raised = in_two_processes(folder / "processes", two)
        for name, changes in {
            "one": {},
            "accumulated": {"micro_batch_size": 2},
            "bf16": {"precision": "bf16"},
            **{name: {"model": model, "max_steps": 5} for name, model in PROJECTORS.items()},
        }.items():
            train(run(name, **changes))

    def losses(self, name: str) -> list[float]:
        assert name not in self.raised, self.raised[name]
        return [line["loss"] for line in read_metrics(self.folder / name)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model/model.safetensors")

    def assert_equal(self, name: str, reference: str) -> None:
        assert self.losses(name) == pytest.approx(self.losses(reference), abs=1e-5)
        weights, expected = self.weights(name), self.weights(reference)
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(
                weights[key], tensor, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.fixture(scope="module")
def _runs() -> dict[str, Runs]:
    return {}


@pytest.fixture
def runs(
    _runs: dict[str, Runs], material: Path, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    if device.type not in _runs:
        _runs[device.type] = Runs(material, tmp_path_factory.mktemp(device.type), device.type)
    return _runs[device.type]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(runs: Runs, engine: str) -> None:
    _need(engine)
    runs.assert_equal("accumulated", "one")
    runs.assert_equal(engine, "one")


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("engine", SHARDING)
def test_projectors_in_shards(runs: Runs, engine: str, projector: str) -> None:
    _need(engine)
    runs.assert_equal(f"{engine}-{projector}", projector)


@pytest.mark.parametrize("engine", SHARDING)
def test_sixteen_bits_in_shards(runs: Runs, engine: str) -> None:
    """Shards compute in bfloat16 throughout, one process under autocast: close, not equal."""
    _need(engine)
    assert runs.losses(f"{engine}-bf16") == pytest.approx(runs.losses("bf16"), abs=0.05)
    frozen = [name for name in runs.weights("one") if "vision_tower" in name]
    assert frozen
    assert all(torch.equal(runs.weights(f"{engine}-bf16")[name], runs.weights("one")[name]) for name in frozen)
