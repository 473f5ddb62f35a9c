"""The batches of a run, step by step, for one process."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from llava_npu.data import IGNORE_INDEX
from llava_npu.data.dataset import ConversationDataset, Sample, collate, pack
from llava_npu.data.plan import BatchLayout, Indices
from llava_npu.distributed.launched import worker_dies_with_parent
from llava_npu.errors import UserError

_SHM, _LEAST_SHM = Path("/dev/shm"), 2**20
_SHARED_MEMORY = (
    "The shared memory (/dev/shm) through which they hand over batches is too small or full. Make it larger (docker "
    "run --shm-size=16g …), or set data.workers=0."
)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, and the counts that are known before it, on the host.

    Attributes:
        tensors: what `SupervisedLoss` takes.
        sequence_lengths: tokens of each sample, row after row, the padding behind them counted as another.
        sample_lengths: the same without the padding.
        supervised_tokens: how many tokens are learned from.
        replaced: what was wrong with the samples that others stand in for.
        names: of the samples, for messages.
        image_sizes: each image's (height, width), where the model needs them; on the host, where they are read.
    """

    tensors: dict[str, torch.Tensor]
    sequence_lengths: tuple[int, ...]
    sample_lengths: tuple[int, ...]
    supervised_tokens: int
    replaced: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] | None = None

    @property
    def tokens(self) -> int:
        """How many there are, padding not counted."""
        return sum(self.sample_lengths)

    @property
    def images(self) -> int:
        """How many images (with anyres: tiles) are encoded, or come as features."""
        return next(
            (len(self.tensors[name]) for name in ("pixel_values", "vision_features") if name in self.tensors), 0
        )

    def share_memory(self) -> MicroBatch:
        """Moves the tensors to where another process finds them. A worker's queue would do it too, but in a thread
        whose errors nobody hears of: with no room left, everybody would wait for ever.
        """
        for tensor in self.tensors.values():
            tensor.share_memory_()
        return self

    def pin_memory(self) -> MicroBatch:
        """Copies into memory from which an accelerator can fetch while the host continues."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> dict[str, Any]:
        """What `SupervisedLoss` takes, its tensors on the device."""
        batch: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return batch if self.image_sizes is None else {**batch, "image_sizes": self.image_sizes}


def steps(
    dataset: ConversationDataset,
    layout: BatchLayout,
    *,
    first_step: int,
    last_step: int,
    rank: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[list[MicroBatch]]:
    """Each optimizer step's micro-batches of this process, from `first_step` up to `last_step` (exclusive).

    The order is a pure function of the layout: it does not depend on where a run was interrupted or on the workers.
    """

    def shares() -> Iterator[Sequence[Indices]]:  # as they are needed: a list of millions of numbers would be held
        return (layout.share(step, rank) for step in range(first_step, last_step))

    if workers and _SHM.is_dir() and shutil.disk_usage(_SHM).free < _LEAST_SHM:  # semaphores are files there too
        raise UserError(f"data.workers: {_SHARED_MEMORY}")
    processor = dataset.processor
    loader = DataLoader(
        _ErrorsAsSamples(dataset),
        batch_sampler=(
            [(int(index), layout.room(int(index))) for index in samples] for share in shares() for samples in share
        ),
        collate_fn=partial(
            _collate,
            pack_length=layout.pack_length,
            pad_token_id=processor.tokenizer.pad_token_id,
            image_token_id=processor.image_token_id,
        ),
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,  # accelerators do not survive a fork
        worker_init_fn=_start_worker,
        persistent_workers=False,
    )
    batches = map(_raise_error, _until_a_worker_dies(loader))
    return ([next(batches) for _ in share] for share in shares())


def _until_a_worker_dies(loader: Iterable[MicroBatch | UserError]) -> Iterator[MicroBatch | UserError]:
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"data.workers: a process that loads data died: {str(error).splitlines()[0]} Of a bus error the cause is: "
            f"{_SHARED_MEMORY} If it was killed, the machine ran out of memory: set data.workers lower."
        ) from error


def _start_worker(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; when workers end is for the process that they work for to say."""
    worker_dies_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _ErrorsAsSamples(Dataset[Sample | UserError]):
    """Carries errors out of the workers as they are; a data loader would wrap them in the worker's traceback."""

    def __init__(self, dataset: ConversationDataset):
        self._dataset = dataset

    def __getitem__(self, index_and_room: tuple[int, int | None]) -> Sample | UserError:
        try:
            return self._dataset.load(*index_and_room)
        except UserError as error:
            return error.with_traceback(None)


def _raise_error(batch: MicroBatch | UserError) -> MicroBatch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _collate(
    samples: Sequence[Sample | UserError], pack_length: int | None, pad_token_id: int, image_token_id: int
) -> MicroBatch | UserError:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    batch = micro_batch(
        [sample for sample in samples if isinstance(sample, Sample)], pack_length, pad_token_id, image_token_id
    )
    try:
        return batch if get_worker_info() is None else batch.share_memory()
    except RuntimeError as error:
        return UserError(f"data.workers: {_SHARED_MEMORY} ({error})")


def micro_batch(
    samples: Sequence[Sample], pack_length: int | None, pad_token_id: int, image_token_id: int
) -> MicroBatch:
    """Samples as one forward pass: packed into a row of `pack_length` tokens or, where that is None, padded."""
    lengths = [len(sample.input_ids) for sample in samples]
    if pack_length is None:
        tensors = collate(samples, pad_token_id)
        longest = max(lengths)
        sequences = [part for length in lengths for part in (length, longest - length)]
    else:
        tensors = pack(samples, pack_length, pad_token_id)
        sequences = [*lengths, pack_length - sum(lengths)]
    # Padding is a sequence of its own: nothing attends to it, and no mask has to be read back from the device.
    sizes = tensors.pop("image_sizes", None)
    positions = torch.cat([torch.arange(length) for length in sequences])
    tensors["position_ids"] = positions.view_as(tensors["input_ids"])
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    tensors["supervised_positions"] = (tensors["labels"][:, 1:].flatten() != IGNORE_INDEX).nonzero().flatten()
    if "pixel_values" in tensors or "vision_features" in tensors:
        tensors["image_positions"] = (tensors["input_ids"].flatten() == image_token_id).nonzero().flatten()
    return MicroBatch(
        tensors,
        sequence_lengths=tuple(sequences),
        sample_lengths=tuple(lengths),
        supervised_tokens=len(tensors["supervised_positions"]),
        replaced=tuple(sample.replaced for sample in samples if sample.replaced is not None),
        names=tuple(sample.name for sample in samples),
        image_sizes=None if sizes is None else tuple((height, width) for height, width in sizes.tolist()),
    )
