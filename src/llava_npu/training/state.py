"""What a checkpoint holds, beyond files: weights trained so far, optimizer, random state, place in the run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.training.parts import trained_parameters

WEIGHTS = "trained.safetensors"
OPTIMIZER = "optimizer.pt"


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes all trained weights (never only the projector's) and the optimizer; one process does it."""
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(model)}
    save_file(weights, folder / WEIGHTS)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what `save_state` wrote; every trained weight must be there and no other."""
    saved = load_file(folder / WEIGHTS)
    trained = dict(trained_parameters(model))
    if saved.keys() != trained.keys():
        different = sorted(saved.keys() ^ trained.keys())
        raise UserError(f"{folder / WEIGHTS} does not hold what this run trains: {', '.join(different[:6])} …")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu"))


def random_state(device: Device) -> dict[str, Any]:
    """The state of every random generator of this process, the device's own included."""
    version, keys, gauss = random.getstate()
    _, numpy_keys, *numpy_rest = np.random.get_state()
    return {
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(np.asarray(numpy_keys, dtype=np.int64)), *(float(value) for value in numpy_rest)],
        "torch": torch.get_rng_state(),
        "device": device.rng_state(),
    }


def restore_random_state(state: dict[str, Any], device: Device) -> None:
    """Puts back what `random_state` gave."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", numpy_keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    device.set_rng_state(state["device"])


def random_state_file(folder: Path, rank: int) -> Path:
    """Where a rank's random state stands in a checkpoint."""
    return folder / f"random-{rank:05d}.pt"
