"""A training step never makes the host wait for the device. Counted on the simulated NPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llava_npu.config import RunConfig
from llava_npu.training import train


@pytest.mark.parametrize(("stage", "pack_tokens"), [("align", None), ("finetune", None), ("finetune", 256)])
def test_more_steps_mean_no_more_waiting(
    make_run: Callable[..., RunConfig], device: torch.device, stage: str, pack_tokens: int | None
) -> None:
    if device.type != "npu":
        pytest.skip("the simulated NPU counts waits; other devices do not")
    from torch_npu.simulation import count_host_syncs

    found = []
    for steps in (2, 8):
        changes = {"stage": stage, "pack_tokens": pack_tokens, "max_steps": steps, "log_every": 100}
        run = make_run(f"{steps}-steps", micro_batch_size=4, **changes)
        with count_host_syncs() as syncs:
            train(run)
        found.append(syncs)
    short, long = found
    assert long.total == short.total, {"2 steps": short.by_kind, "8 steps": long.by_kind}
    assert long.uploads == short.uploads  # batches come from pinned memory
