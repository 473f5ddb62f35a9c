"""A training step makes the host wait for the device once, for whether the gradient is finite: an NPU's fused optimizer
would not skip the step by itself. Nothing else waits. Counted on the simulated NPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_npu.config import RunConfig, render_config
from llava_npu.training import train
from llava_npu.training.monitoring.metrics import read_metrics


@pytest.mark.parametrize(
    ("stage", "pack_tokens", "precision"),
    [("align", None, "fp32"), ("finetune", None, "bf16"), ("finetune", 256, "fp32"), ("finetune", 256, "fp16")],
)
def test_a_step_waits_once_for_the_gradients_norm(
    make_run: Callable[..., RunConfig], device: torch.device, stage: str, pack_tokens: int | None, precision: str
) -> None:
    """Although each of them is reported (`log_every` is 1)."""
    if device.type != "npu":
        pytest.skip("the simulated NPU counts waits; other devices do not")
    from torch_npu.simulation import count_host_syncs
    from torch_npu.simulation.counters import UPLOADS

    found = []
    for steps in (2, 8):
        changes = {"stage": stage, "pack_tokens": pack_tokens, "max_steps": steps, "precision": precision}
        run = make_run(f"{steps}-steps", micro_batch_size=4, **changes)
        with count_host_syncs() as syncs:
            train(run)
        assert len(read_metrics(run.output_path)) == steps
        found.append(syncs)
    short, long = found
    more = {kind: count - short.by_kind.get(kind, 0) for kind, count in long.by_kind.items() if kind != UPLOADS}
    assert {kind: count for kind, count in more.items() if count} == {"aten::_local_scalar_dense": 8 - 2}
    assert long.uploads == short.uploads  # batches come from pinned memory


_COUNT = """
import json, os, sys
from pathlib import Path
from llava_npu.config import load_config
from llava_npu.training import train
from llava_npu.training.monitoring.metrics import read_metrics
from torch_npu.simulation import count_host_syncs

found = []
for config in sys.argv[2:]:
    with count_host_syncs() as syncs:
        train(load_config(config))
    found.append({"waits": syncs.total, **syncs.by_kind})
Path(sys.argv[1], f"waits-{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_nor_do_processes_that_count_together(
    make_run: Callable[..., RunConfig], device: torch.device, tmp_path: Path
) -> None:
    """What a step needs to know of the other processes is exchanged between the hosts.

    Uploads are not compared: the simulated hccl, which gloo carries, copies each reduced gradient back.
    """
    if device.type != "npu":
        pytest.skip("the simulated NPU counts waits; other devices do not")
    configs = []
    for steps in (2, 8):
        run = make_run(f"{steps}-steps", pack_tokens=256, max_steps=steps)
        configs.append(tmp_path / f"{steps}.yaml")
        configs[-1].write_text(render_config(run))
    (tmp_path / "count.py").write_text(_COUNT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(tmp_path / "count.py"), str(tmp_path), *map(str, configs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        short, long = json.loads((tmp_path / f"waits-{rank}.json").read_text())
        assert long["waits"] == short["waits"] + 8 - 2, {"2 steps": short, "8 steps": long}
