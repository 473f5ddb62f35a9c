"""Two processes compute what one computes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_npu.config import RunConfig, render_config
from llava_npu.training import train
from llava_npu.training.monitoring.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("pack_tokens", [pytest.param(None, marks=pytest.mark.exhaustive), 256])
def test_two_processes_equal_one(make_run: Callable[..., RunConfig], tmp_path: Path, pack_tokens: int | None) -> None:
    alone = make_run("alone", max_steps=5, micro_batch_size=4, pack_tokens=pack_tokens)
    train(alone)
    # Some of the micro-batches hold text only on one process and images on the other.
    both = make_run("both", max_steps=5, micro_batch_size=2, pack_tokens=pack_tokens)
    (tmp_path / "both.yaml").write_text(render_config(both))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "llava_npu", "train", str(tmp_path / "both.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    losses = [[line["loss"] for line in read_metrics(run.output_path)] for run in (alone, both)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    expected = load_file(alone.output_path / "model/model.safetensors")
    actual = load_file(both.output_path / "model/model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-5, rtol=0, msg=name)
