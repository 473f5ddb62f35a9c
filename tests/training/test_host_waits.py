"""A training step never makes the host wait for the device. Counted on the simulated NPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llava_npu.config import RunConfig
from llava_npu.training import train


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_more_steps_mean_no_more_waiting(make_run: Callable[..., RunConfig], device: torch.device, stage: str) -> None:
    if device.type != "npu":
        pytest.skip("the simulated NPU counts waits; other devices do not")
    from torch_npu.simulation import count_host_syncs

    found = []
    for steps in (2, 8):
        run = make_run(f"{steps}-steps", stage=stage, max_steps=steps, micro_batch_size=4, log_every=100)
        with count_host_syncs() as syncs:
            train(run)
        found.append(syncs)
    short, long = found
    assert long.total == short.total, {"2 steps": short.by_kind, "8 steps": long.by_kind}
    assert long.uploads == short.uploads  # batches come from pinned memory
