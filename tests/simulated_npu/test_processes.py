"""Files, data loader workers, forks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


def test_save_and_load_across_devices(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    state = {"weight": torch.arange(4.0, device="npu:1"), "view": torch.arange(6, device="npu")[2:4], "step": 3}
    torch.save(state, path)
    as_saved = torch.load(path, weights_only=True)
    assert as_saved["weight"].device == torch.device("npu:1")
    for location in ("cpu", "npu:0", torch.device("npu", 1)):
        loaded = torch.load(path, map_location=location, weights_only=True)
        assert loaded["weight"].device == torch.device(location)
        assert loaded["weight"].tolist() == [0, 1, 2, 3]
        assert loaded["view"].tolist() == [2, 3]
        assert loaded["step"] == 3


def test_cpu_checkpoint_loads_on_the_device(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = nn.Linear(3, 3).to("npu")
    other.load_state_dict(torch.load(tmp_path / "model.pt", map_location="npu", weights_only=True))
    assert torch.equal(other.weight.cpu(), model.weight)


class Squares(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index**2)]), os.getpid()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_data_loader_workers(start_method: str) -> None:
    """Workers make CPU tensors; the parent, which already uses the device, pins and uploads them."""
    torch.ones(1, device="npu")
    loader = DataLoader(
        Squares(), batch_size=3, num_workers=2, pin_memory=True, multiprocessing_context=start_method, timeout=300
    )
    seen, workers = [], set()
    for values, pids in loader:
        assert values.is_pinned()
        seen += values.to("npu", non_blocking=True).flatten().tolist()
        workers |= set(pids.tolist())
    assert seen == [float(i**2) for i in range(12)]
    assert len(workers) == 2
    assert os.getpid() not in workers


class OnDevice(Squares):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.ones(1, device="npu").cpu(), index


def test_device_work_in_a_forked_worker_fails_as_on_hardware() -> None:
    torch.ones(1, device="npu")
    loader = DataLoader(OnDevice(), num_workers=1, multiprocessing_context="fork", timeout=300)
    with pytest.raises(RuntimeError, match="Cannot re-initialize NPU in forked subprocess"):
        next(iter(loader))
    assert torch.ones(1, device="npu").item() == 1  # the parent goes on


def test_device_work_in_a_spawned_worker_is_fine() -> None:
    loader = DataLoader(OnDevice(), num_workers=1, multiprocessing_context="spawn", timeout=300)
    assert next(iter(loader))[0].item() == 1
