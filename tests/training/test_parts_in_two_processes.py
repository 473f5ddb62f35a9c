"""Adapters, a trained tower, a skipped step and a validation, in two processes as in one, whole and in shards."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_npu.config import RunConfig
from llava_npu.training import train
from llava_npu.training.monitoring.jsonl import read_lines
from llava_npu.training.monitoring.metrics import read_metrics
from support.poisoned_run import poisoned_run, without_check
from support.small_run import in_two_processes, skip_off_the_cpu, small_run

ADAPTERS = {
    "parts": {"language_model": {"train": "lora"}, "vision_tower": {"train": "lora"}},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
}
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ENGINES = ["ddp", "fsdp2", *(["zero3"] if DEEPSPEED else [])]
# Each forgets in its own way what it had accumulated of a step that is skipped.
SKIPPING: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2"},
    **(
        {
            "zero2-offload": {"engine": "zero2", "engine_options": {"offload_optimizer": True}},
            "zero3-offload": {
                "engine": "zero3",
                "engine_options": {"offload_optimizer": True, "offload_parameters": True},
            },
        }
        if DEEPSPEED
        else {}
    ),
}


class Runs:
    """Each kind of run in one process, and with each engine in two."""

    def __init__(self, material: Path, folder: Path, device_type: str, exhaustive: bool):
        self.folder, self.device_type = folder, device_type
        kinds: dict[str, dict[str, Any]] = {
            "adapters": ADAPTERS,
            "tower": {"parts": {"vision_tower": {"train": "full"}}},
            "validating": {"data": {"validation": {"size": 5, "every": 2}}},
            "skipping": poisoned_run(material, folder / "poisoned"),
        }
        if device_type != "cpu" and not exhaustive:
            kinds = {"skipping": kinds["skipping"]}  # what depends on the device's optimizer

        def run(name: str, **changes: Any) -> RunConfig:
            return small_run(material, folder / name, device_type, max_steps=4, **changes)

        two = {
            f"{engine}-{kind}": run(f"{engine}-{kind}", engine=engine, micro_batch_size=2, **changes)
            for engine in ENGINES
            for kind, changes in kinds.items()
            if kind != "skipping"
        } | {
            f"{name}-skipping": run(f"{name}-skipping", micro_batch_size=2, **engine, **kinds["skipping"])
            for name, engine in SKIPPING.items()
        }
        self.raised = in_two_processes(folder / "processes", two)
        with without_check():
            for kind, changes in kinds.items():
                train(run(kind, **changes))

    def column(self, name: str, key: str) -> list[Any]:
        assert name not in self.raised, self.raised[name]
        if self.device_type != "cpu" and not (self.folder / name).is_dir():
            skip_off_the_cpu()
        return [line[key] for line in read_metrics(self.folder / name)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        model = self.folder / name / "model"
        return load_file(next(model.glob("*model.safetensors")))


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


def _assert_equal(runs: Runs, name: str, kind: str) -> None:
    for key in ("loss", "grad_norm", "validation_loss"):
        assert runs.column(name, key) == pytest.approx(runs.column(kind, key), abs=1e-4 if key == "grad_norm" else 1e-5)
    weights = runs.weights(name)
    for key, tensor in runs.weights(kind).items():
        torch.testing.assert_close(
            weights[key], tensor, atol=1e-5, rtol=0, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters", "tower", "validating"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(runs: Runs, engine: str, kind: str) -> None:
    _assert_equal(runs, f"{engine}-{kind}", kind)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SKIPPING)
def test_every_engine_skips_what_one_process_skips(runs: Runs, engine: str) -> None:
    name = f"{engine}-skipping"
    _assert_equal(runs, name, "skipping")
    found, expected = (read_lines(runs.folder / each / "nonfinite_steps.jsonl") for each in (name, "skipping"))
    if engine.startswith("zero3"):  # where a module's weights are given up before its output can be looked at
        expected = [{**line, "what": "output"} for line in expected]
    assert found == expected
    assert len(found) >= 1
