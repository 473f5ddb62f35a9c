"""The planned memory of a node against what the processes of a run take; benchmarks/host_memory.py does larger ones."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from llava_npu.planning.host import LAUNCHER, PROCESS
from support.benchmark_scripts import load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("host_memory")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's count of shared pages")
@pytest.mark.exhaustive
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
