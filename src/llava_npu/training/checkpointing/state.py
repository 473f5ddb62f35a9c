"""What a checkpoint holds, as files: tensors by name, random states by process, the place in the run."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llava_npu.devices import Device

WEIGHTS = "trained"  # every trained weight, whole
OPTIMIZER = "optimizer"  # exp_avg/NAME and so on, for every trained weight
RANDOM = "random.pt"  # of every process
PLACE = "place.json"  # where in the run this is

_FILE_BYTES = 4 * 2**30


def write_tensors(folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes (name, tensor) pairs into STEM-00001.safetensors and so on.

    No more than a few GiB are held at once, if `tensors` makes them one by one.
    """
    held: dict[str, torch.Tensor] = {}
    size = written = 0
    for name, tensor in tensors:
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        if size >= _FILE_BYTES:
            written += 1
            save_file(held, folder / f"{stem}-{written:05d}.safetensors")
            held, size = {}, 0
    if held or not written:
        save_file(held, folder / f"{stem}-{written + 1:05d}.safetensors")


class SavedTensors(Mapping[str, torch.Tensor]):
    """What `write_tensors` wrote, read from disk when asked for."""

    def __init__(self, folder: Path, stem: str):
        self._files = [safe_open(path, "pt") for path in sorted(folder.glob(f"{stem}-*.safetensors"))]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def write_place(folder: Path, place: Mapping[str, Any]) -> None:
    """Says in which run, and where in it, a checkpoint was written."""
    (folder / PLACE).write_text(json.dumps(place, indent=1) + "\n", encoding="utf-8")


def write_random_states(folder: Path, states: Sequence[dict[str, Any]]) -> None:
    """Writes the random state of each process, in their order."""
    stream = io.BytesIO()  # a file of torch's own would report a full disk as something else
    torch.save(list(states), stream)
    (folder / RANDOM).write_bytes(stream.getbuffer())


def read_random_state(folder: Path, process: int) -> dict[str, Any] | None:
    """The random state of a process; None if there were fewer processes when the checkpoint was written."""
    states = torch.load(folder / RANDOM, weights_only=True)
    return states[process] if process < len(states) else None


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
