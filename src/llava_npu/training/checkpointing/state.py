"""What a checkpoint holds, as files: tensors by name, random states by process, the place in the run.

Tensors are in the format of `torch.distributed.checkpoint` (DCP): every process writes what it holds into a file of its
own, and an index says where each block of a tensor is. So they can be read in other blocks, by any number of processes.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from llava_npu.devices import Device
from llava_npu.errors import UserError

TENSORS = "state"  # a folder in DCP's format
RANDOM = "random.pt"  # of every process
PLACE = "place.json"  # where in the run this is

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
_READ_AT_ONCE = 2**30  # bytes


def weight_key(name: str) -> str:
    """What a trained weight is called in a checkpoint."""
    return f"model.{name}"


def moment_key(name: str, key: str) -> str:
    """What the optimizer's `key` ("exp_avg") of the weight `name` is called, as torch's flat state dictionaries do."""
    return f"optimizer.state.{name}.{key}"


def scale_key(key: str) -> str:
    """What a value of the loss scaler is called."""
    return f"loss_scale.{key}"


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes this process's part of all tensors, synced to disk; every process of `group` calls it.

    Args:
        tensors: a `DTensor` where each process has a part; what several processes give is written by one of them.
        group: None: this process is alone.

    Raises:
        dcp.CheckpointException: in every process, whichever failed; see `cause`.
    """
    _silence()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder / TENSORS), process_group=group, no_dist=group is None)


def _silence() -> None:
    """DCP warns where a process is alone and, in torch 2.7, of its own use of storages."""
    for message in ("torch.distributed is disabled", "TypedStorage is deprecated"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


def cause(error: dcp.CheckpointException) -> BaseException:
    """What went wrong in the first process in which something did."""
    return error.failures[min(error.failures)][0]


def own_files(folder: Path, process: int) -> Iterable[Path]:
    """The files that `write_tensors` wrote in this process."""
    return (folder / TENSORS).glob(f"__{process}_*")


class SavedState:
    """The tensors of a checkpoint, read from disk when asked for, in the parts that are asked for.

    Attributes:
        shapes: of all tensors as wholes, by name.
    """

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        if not (checkpoint / TENSORS).is_dir():
            raise UserError(
                f"{checkpoint}: has no folder {TENSORS}/. It was written by an earlier version of llava-npu, whose "
                "checkpoints this one does not read. Finish the run with that version, or start over with --fresh."
            )
        try:
            metadata = dcp.FileSystemReader(checkpoint / TENSORS).read_metadata()
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{checkpoint}: {TENSORS}/.metadata is missing or damaged ({error}).") from error
        tensors = {
            name: each
            for name, each in metadata.state_dict_metadata.items()
            if isinstance(each, dcp.TensorStorageMetadata)
        }
        self.shapes: Mapping[str, torch.Size] = {name: each.size for name, each in tensors.items()}
        self._dtypes = {name: each.properties.dtype for name, each in tensors.items()}

    def check(self, trained: Mapping[str, Sequence[int]]) -> None:
        """Raises `UserError` where the checkpoint does not hold exactly these weights, of these shapes."""
        wanted = {weight_key(name): tuple(shape) for name, shape in trained.items()}
        found = {name: tuple(shape) for name, shape in self.shapes.items() if name.startswith(weight_key(""))}
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if different:
            shown = ", ".join(name.removeprefix(weight_key("")) for name in different[:6])
            raise UserError(
                f"{self._checkpoint}: does not hold what this run trains. {len(different)} weights differ in name or "
                f"shape: {shown}{' …' if len(different) > 6 else ''}. Undo what changed in the configuration, or give "
                "another `output`."
            )

    def files(self) -> list[Path]:
        """The files that the tensors are in, one or more from each process that wrote them."""
        return sorted((self._checkpoint / TENSORS).glob("__*"))

    def moments(self, name: str) -> list[str]:
        """What there is of the optimizer's state for the weight `name`: nothing, if it has not moved yet."""
        return [key for key in _MOMENTS if moment_key(name, key) in self.shapes]

    def read(self, targets: dict[str, torch.Tensor]) -> None:
        """Fills these tensors in place, of a `DTensor` this process's part; no other process is asked."""
        _silence()
        try:
            dcp.load(targets, storage_reader=dcp.FileSystemReader(self._checkpoint / TENSORS), no_dist=True)
        except dcp.CheckpointException as error:
            raise UserError(f"{self._checkpoint}: cannot be read: {cause(error)}.") from error

    def whole(self, name: str) -> torch.Tensor:
        """A tensor as a whole, on the host."""
        tensor = self._room(name)
        self.read({name: tensor})
        return tensor

    def wholes(self, names: Iterable[str], key_of: Callable[[str], str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of each, on the host; about a GiB of them is held at once."""
        batch: dict[str, torch.Tensor] = {}
        remaining = list(names)
        for number, name in enumerate(remaining, start=1):
            batch[name] = self._room(key_of(name))
            if number == len(remaining) or sum(tensor.nbytes for tensor in batch.values()) >= _READ_AT_ONCE:
                self.read({key_of(each): tensor for each, tensor in batch.items()})
                yield from batch.items()
                batch = {}

    def _room(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], dtype=self._dtypes[name])


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
