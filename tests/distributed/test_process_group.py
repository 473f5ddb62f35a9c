"""Processes meet again and again, however far one of them is ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_MEET = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from llava_npu.distributed import processes

rank, sums = int(os.environ["RANK"]), []
for meeting in range(6):
    if rank == meeting % 2:  # the other one comes first, and must not be served the last meeting's addresses
        time.sleep(0.3)
    processes.form_group("gloo", timeout=timedelta(seconds=300))
    value = torch.tensor([meeting * 10 + rank])
    dist.all_reduce(value)
    sums.append(value.item())
    dist.destroy_process_group()
Path(sys.argv[1], f"sums-{rank}.json").write_text(str(sums))
"""


@pytest.mark.slow
def test_groups_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(_MEET)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(tmp_path / "meet.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"sums-{rank}.json").read_text()) == [20 * meeting + 1 for meeting in range(6)]
