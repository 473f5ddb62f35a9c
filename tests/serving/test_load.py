"""The load of benchmarks/serving.py, for a few seconds: 64 clients, a quarter of their requests bad."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from types import ModuleType

import pytest

from llava_npu.serving.api.limits import Limits
from support.benchmark_scripts import load_benchmark
from support.running import http, make_service, running


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("serving")


@pytest.mark.slow
def test_no_answer_is_wrong_and_nothing_is_left_over(benchmark: ModuleType, model_folder: Path) -> None:
    options = argparse.Namespace(device="cpu", dtype="float32", cases=8, tokens=12)
    cases, _ = benchmark.make_cases(str(model_folder), options)
    limits = Limits(max_waiting=128, max_request_bytes=benchmark.MAX_REQUEST)
    service = make_service(model_folder, max_batch=16, limits=limits)
    with running(service) as address:
        load = asyncio.run(benchmark.put_load(address, cases, clients=64, seconds=4, bad=0.25))
        assert not load.wrong
        assert set(load.outcomes) > {"whole", "streamed", "left", "oversized"}
        assert http.get(f"{address}/health").status_code == 200
        text = http.get(f"{address}/metrics").text
    assert service.num_unfinished == 0
    values = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in text.splitlines()}
    answers, steps = values["llava_npu_step_answers_sum"], values["llava_npu_step_answers_count"]
    assert float(answers) / float(steps) > 2  # they shared steps
