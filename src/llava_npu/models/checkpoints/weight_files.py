"""Weights in files, one shard in memory at a time: read as safetensors or pickles, written as safetensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llava_npu.distributed.launched import rank, world_size
from llava_npu.errors import UserError
from llava_npu.files.damage import describe_damage
from llava_npu.hub.folders import describe, read_shards

SHARD_BYTES = 2 * 2**30
# In this order: where a folder has both, safetensors cannot run code and load faster.
_STEMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one folder, in a fixed order; iterating gives (name, tensor) without loading them all."""

    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            yield from read_weights(file)


def find_weights(folder: Path) -> WeightFiles | None:
    """The model's weight files in a folder, or None if it has none.

    Raises:
        UserError: an index cannot be read, or names files that are not there.
    """
    for stem, suffix in _STEMS:
        index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        shards = [folder / name for name in _shards(index)] if index.is_file() else []
        if single.is_file():  # first, as transformers has it
            return WeightFiles((single,))
        if shards:
            return WeightFiles(tuple(shards))
    return None


def read_weights(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one file, of all its weights or of those whose name is `wanted`.

    Memory-mapped, so that what is not kept is not held.

    Raises:
        UserError: the file is damaged, or a pickle that holds more than tensors (which could run code).
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                for name in filter(wanted, weights.keys()):
                    yield name, weights.get_tensor(name)
        else:
            yield from ((name, tensor) for name, tensor in _unpickled(file).items() if wanted(name))
    except UserError:
        raise
    except Exception as error:  # damaged pickles raise every type
        if damage := describe_damage(file):
            raise UserError(f"{file} {damage}. Download or copy it again.") from error
        reason = describe(error)
        if isinstance(error, pickle.UnpicklingError):  # whose text is advice on how to run what the file says
            reason = "it is damaged, or holds more than tensors, which could run code"
        raise UserError(f"{file}: cannot be read as weights: {reason}") from error


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format of before torch 1.6 cannot be mapped
        values = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(values, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in values.values()):
        raise UserError(f"{file}: holds something else than named tensors.")
    return values


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], place: str, *, shared: bool = False) -> None:
    """Raises `UserError` where a weight is NaN or infinite: nothing that such a model answers means anything.

    One pass over the memory of each tensor, on its device; one wait for all.

    Args:
        shared: all launched processes load these weights: each looks at a part of them, and one that raises ends all.
    """
    first, step = (rank(), world_size()) if shared else (0, 1)
    flags = {
        name: is_finite(tensor)
        for name, tensor in islice(weights, first, None, step)
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta"
    }
    if not flags or bool(torch.stack(list(flags.values())).all()):
        return
    broken = [name for name, flag in flags.items() if not flag]
    shown = ", ".join(broken[:6]) + (" …" if len(broken) > 6 else "")
    raise UserError(
        f"{place}: weights that are NaN or infinite, {len(broken)} in all: {shown}. The file is damaged, or training "
        "diverged before it was written; take another copy or an earlier checkpoint."
    )


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.element_size() == 1:  # eight-bit floats know few operations
        tensor = tensor.float()
    if tensor.device.type == "cpu":  # the least and the greatest take no further memory
        least, greatest = torch.aminmax(tensor)
        return least.isfinite() & greatest.isfinite()
    return tensor.isfinite().all()


def write_weights(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` and an index, as transformers does."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal pending, held
        shards.append(list(pending))
        save_file(pending, _numbered(folder, len(shards)), metadata={"format": "pt"})
        pending, held = {}, 0

    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if pending and held + size > shard_bytes:
            flush()
        # A copy of its own: a view would be refused, or write what it is a view of.
        pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        held, total = held + size, total + size
    flush()

    if len(shards) == 1:
        _numbered(folder, 1).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        final = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _numbered(folder, number).rename(final)
        weight_map.update(dict.fromkeys(names, final.name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05d}.safetensors"


def _shards(index: Path) -> list[str]:
    names = read_shards(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: names files that are missing: {', '.join(missing)}.")
    return names
