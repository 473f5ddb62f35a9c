"""The planned memory of a node against what the processes of a run take; benchmarks/host_memory.py does larger ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llava_npu.planning.host import LAUNCHER, PROCESS

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "host_memory.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_host_memory", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's count of shared pages")
@pytest.mark.parametrize(("engine", "stage"), [("ddp", "align"), ("fsdp2", "finetune")])
def test_a_node_takes_what_is_planned(benchmark: ModuleType, tmp_path: Path, engine: str, stage: str) -> None:
    material = tmp_path / "material"
    benchmark.write_models(material, hidden=512, layers=2, vocabulary=60_000, dtype=torch.float32)
    folder = tmp_path / "run"
    folder.mkdir()
    config = benchmark.run_config(engine, stage, 2, folder, material, precision="fp32")
    measured = benchmark.measure(config, 2, folder)
    # Never too little. A sharding engine gives up what was mapped before its step takes most, and libraries are shared
    # with whatever else runs Python on this machine: the plan counts both in full.
    assert 0.95 < benchmark.planned(config, 2) / measured.step < 1.6
    stored = sum(file.stat().st_size for file in material.rglob("*.safetensors"))
    if engine == "ddp":  # frozen weights: one copy for both
        assert measured.step < 1.3 * stored + 2 * PROCESS + LAUNCHER
