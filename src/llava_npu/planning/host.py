"""The memory of one node while a run loads and trains.

Pretrained weights stay in their files, mapped: the processes of a node share one copy, as it is stored
(`models/checkpoints/mapped.py`). To each process belong its libraries, the weights that are made and not read, and what
its engine keeps on the host; where the device is the CPU, all that the device holds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from llava_npu.config import RunConfig
from llava_npu.files.json_objects import read_json
from llava_npu.hub.hubs import is_local
from llava_npu.models.adapters import is_adapter_folder, is_adapter_parameter
from llava_npu.models.checkpoints.weight_files import find_weights
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.published import published_model
from llava_npu.models.sources import MODEL_FOLDER, ModelSource
from llava_npu.planning.memory import EngineChoice, PeakMemory
from llava_npu.planning.target import Target
from llava_npu.training.parts import PREFIXES, part_of
from llava_npu.training.resolve import ResolvedRun

MIB = 2**20
# Measured with a tiny model on a CPU: 431 MiB for one process, 1,061 for two and 1,815 for four with their launcher.
# Drivers of an accelerator come on top.
PROCESS = 350 * MIB  # Python, torch, transformers and what they hold, of one process of several
LAUNCHER = 310 * MIB  # the process that started them
ALONE = 80 * MIB  # more of a single process, which shares its libraries with no other
WORKER = 330 * MIB  # of `data.workers`: an estimate, not measured
_PREFETCHED = 2  # micro-batches of a worker, torch's default


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one node.

    Attributes:
        mapped: weights as stored, once for all processes. They are the operating system's to drop and to read again.
        processes: libraries, data workers, weights that are made and not read, of all processes.
        engine: what the engine keeps on the host, of all processes; of a CPU, all that it trains with.
    """

    mapped: int
    processes: int
    engine: int

    @property
    def total(self) -> int:
        return self.mapped + self.processes + self.engine


def host_memory(
    run: ResolvedRun,
    model: LlavaNpuForConditionalGeneration,
    engine: EngineChoice,
    peak: PeakMemory,
    target: Target,
) -> HostMemory:
    """Of a run on one of the target's nodes.

    Args:
        model: as it is trained, without numbers.
        peak: of one device, and of the host for one device, under this engine.
    """
    processes = target.count // target.nodes
    read = {name: each for name, each in model.named_parameters() if _is_read(name)}
    elements = sum(each.numel() for each in read.values())
    stored = _stored(run.source, read)
    new = 4 * sum(each.numel() for name, each in model.named_parameters() if name not in read)
    largest = 4 * max(each.numel() for each in read.values())  # on its way into another type
    kept = peak.host
    if target.kind == "cpu":
        kept += peak.device.total
        size = (target.compute_dtype or torch.float32).itemsize
        if engine.type.keeps_whole_layers and stored > 0.9 * size * elements:  # frozen ones stay where they are
            kept -= size * sum(each.numel() for each in read.values() if not each.requires_grad)
            largest = 0
    each_process = PROCESS + run.config.data.workers * WORKER + new + largest
    mapped = stored + _enlarged_tables(run.source, model)
    return HostMemory(mapped, (LAUNCHER if processes > 1 else ALONE) + processes * each_process, processes * kept)


def available_memory() -> int:
    """Bytes of this machine's memory that programs may still take, or of this container's."""
    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
    except (OSError, ValueError, KeyError):  # no limit ("max"), or no such group
        return free
    return min(free, limit - used + int(cached))


def shared_memory_needed(config: RunConfig, model: LlavaNpuConfig, processes: int) -> int:
    """Bytes of /dev/shm that data workers hand their micro-batches over in: two of each worker are under way.

    Args:
        processes: of one node.
    """
    images = config.pack_tokens // model.num_image_tokens if config.pack_tokens else config.micro_batch_size
    of_a_batch = 4 * model.tower.pixels[0] * math.prod(model.input_size) * max(images, 1)
    return processes * config.data.workers * _PREFETCHED * of_a_batch


def _is_read(name: str) -> bool:
    return part_of(name) != "projector" and not is_adapter_parameter(name)


def _stored(source: ModelSource, read: Mapping[str, nn.Parameter]) -> int:
    """Bytes of the weights in their files.

    Of those that are not on this machine: two for each on a hub, four in what another run is still to write.
    """
    if source.checkpoint is not None:
        return _stored_in(source.checkpoint, read.values(), absent=4 if is_local(source.checkpoint) else 2)
    towers = source.vision_towers
    prefixes = [PREFIXES["vision_tower"] + name for name in (("first.", "second.") if len(towers) > 1 else ("",))]
    of_towers = sum(
        _stored_in(place, [each for name, each in read.items() if name.startswith(prefix)], absent=2)
        for place, prefix in zip(towers, prefixes, strict=True)
    )
    text = [each for name, each in read.items() if part_of(name) == "language_model"]
    return of_towers + _stored_in(source.parts["language_model"], text, absent=2)


def _stored_in(place: str, weights: Iterable[nn.Parameter], absent: int) -> int:
    elements = sum(each.numel() for each in weights)
    folder = _folder(place)
    if folder is None:
        return absent * elements
    if is_adapter_folder(folder):  # a copy with them merged is float32
        return 4 * elements
    files = find_weights(folder)
    # Of a whole CLIP nothing reads the text half.
    return absent * elements if files is None else min(files.num_bytes, 4 * elements)


def _enlarged_tables(source: ModelSource, model: LlavaNpuForConditionalGeneration) -> int:
    """Bytes of an embedding and a head with rows for added tokens, which are in a file of their own, in float32."""
    if source.checkpoint is not None:
        return 0
    place = source.parts["language_model"]
    folder = _folder(place)
    text = published_model(place) if folder is None else None
    rows = read_json(folder / "config.json").get("vocab_size") if folder else getattr(text, "vocab_size", None)
    size = model.config.text_config
    if rows is None or rows >= size.vocab_size:
        return 0
    return 4 * size.vocab_size * size.hidden_size * (1 if model.config.tie_word_embeddings else 2)


def _folder(place: str) -> Path | None:
    """The model folder that a place names, if it is on this machine and no model of a hub."""
    folder = Path(place).expanduser()
    if not is_local(place) or not folder.is_dir():
        return None
    return folder / MODEL_FOLDER if (folder / MODEL_FOLDER).is_dir() else folder
