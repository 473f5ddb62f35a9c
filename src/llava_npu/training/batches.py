"""The batches of a run, step by step, for one process."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from llava_npu.data.conversation.labels import IGNORE_INDEX
from llava_npu.data.dataset import ConversationDataset, Processor, Sample, collate, pack
from llava_npu.data.plan import BatchLayout, Indices
from llava_npu.distributed.launched import worker_dies_with_parent
from llava_npu.errors import UserError

_Value = TypeVar("_Value")

SHARED_MEMORY, _LEAST_SHARED = Path("/dev/shm"), 2**20
_TOO_LITTLE = (
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
        parts: how many equal parts the rows are split into, of which `tensors` are one (`part_of`); all other lengths
            and counts but `supervised_tokens` are of the whole rows.
        part_tokens: with several parts, the tokens of this one, padding not counted.
        supervised_tokens: how many tokens are learned from.
        replaced: what was wrong with the samples that others stand in for.
        names: of the samples, for messages.
        image_sizes: each image's (height, width), where the model needs them; on the host, where they are read.
        tokens_per_image: how many tokens each image has, where it varies; on the host too.
    """

    tensors: dict[str, torch.Tensor]
    sequence_lengths: tuple[int, ...]
    sample_lengths: tuple[int, ...]
    supervised_tokens: int
    replaced: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] | None = None
    tokens_per_image: tuple[int, ...] | None = None
    parts: int = 1
    part_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """How many this process has, padding not counted."""
        return sum(self.sample_lengths) if self.part_tokens is None else self.part_tokens

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
        known = {"image_sizes": self.image_sizes, "tokens_per_image": self.tokens_per_image}
        return batch | {name: values for name, values in known.items() if values is not None}


@dataclass(frozen=True)
class SequenceSplit:
    """Which of several equal parts of every row a process has: the `index`-th of `parts`."""

    index: int = 0
    parts: int = 1


WHOLE = SequenceSplit()


@dataclass(frozen=True)
class Share:
    """Which of a run's data a process has: that of group `group`, and there the part `split` of every row."""

    group: int
    split: SequenceSplit = WHOLE

    @classmethod
    def of_process(cls, index: int, sequence_parallel_size: int) -> Share:
        """Processes with neighbouring numbers, as a node's, share a sequence."""
        group, part = divmod(index, sequence_parallel_size)
        return cls(group, SequenceSplit(part, sequence_parallel_size))


@dataclass(frozen=True)
class StepLoader:
    """Loads the micro-batches of one process, an optimizer step's at a time.

    Attributes:
        layout: which samples each step has.
        share: which of them, and what of each, the process has.
        pin_memory: copy them to where an accelerator can fetch them while the host continues.
    """

    dataset: ConversationDataset
    layout: BatchLayout
    share: Share
    pin_memory: bool

    def steps(self, numbers: range, workers: int) -> Iterator[list[MicroBatch]]:
        """Those of the steps with these numbers.

        The order is a pure function of the layout: it does not depend on where a run was interrupted or on the workers.
        """

        def shares() -> Iterator[Sequence[Indices]]:  # as they are needed: a list of millions of numbers would be held
            return (self.layout.share(step, self.share.group) for step in numbers)

        # Semaphores are files there too.
        if workers and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < _LEAST_SHARED:
            raise UserError(f"data.workers: {_TOO_LITTLE}")
        layout, processor = self.layout, self.dataset.processor
        loader = DataLoader(
            _ErrorsAsSamples(self.dataset),
            batch_sampler=(
                [(int(index), layout.room(int(index))) for index in samples] for step in shares() for samples in step
            ),
            collate_fn=partial(_collate, pack_length=layout.pack_length, processor=processor, split=self.share.split),
            num_workers=workers,
            pin_memory=self.pin_memory,
            multiprocessing_context="spawn" if workers else None,  # accelerators do not survive a fork
            worker_init_fn=_start_worker,
            persistent_workers=False,
        )
        # Begun here, not at the first batch: it draws from a generator whose state a resumed run restores after this.
        batches = map(_raise_error, _until_a_worker_dies(_begin(loader)) if workers else iter(loader))
        return ([next(batches) for _ in step] for step in shares())


_raise_deaths: Any = None  # torch's handler of SIGCHLD: it raises if a worker died; torch sets it once in a process


def _begin(loader: DataLoader[Any]) -> Iterator[MicroBatch | UserError]:
    """Starts the workers. Torch would have the death of one raised in the midst of whatever runs, a step of the
    optimizer for one: here it is when the next batch is asked for.
    """
    global _raise_deaths
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    batches = iter(loader)
    if (handler := signal.getsignal(signal.SIGCHLD)) is not before:
        _raise_deaths = handler
        signal.signal(signal.SIGCHLD, before)
    return _raising_deaths(batches, before) if _raise_deaths else batches


def _raising_deaths(batches: Iterator[MicroBatch | UserError], otherwise: Any) -> Iterator[MicroBatch | UserError]:
    while True:
        signal.signal(signal.SIGCHLD, _raise_deaths)
        try:
            _raise_deaths(signal.SIGCHLD, None)  # of those that died before
            batch = next(batches, None)
        finally:
            signal.signal(signal.SIGCHLD, otherwise)
        if batch is None:
            return
        yield batch


def _until_a_worker_dies(batches: Iterator[MicroBatch | UserError]) -> Iterator[MicroBatch | UserError]:
    try:
        yield from batches
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        # Torch says so, unless the process was about to hand over a batch, and is not quite dead yet.
        if ("DataLoader worker" in str(error)) != isinstance(error, RuntimeError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].strip(" .")
        raise UserError(
            f"data.workers: a process that loads data died ({reason}). If it was killed, the machine ran out of "
            f"memory: set data.workers lower. Of a bus error the cause is: {_TOO_LITTLE}"
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
    samples: Sequence[Sample | UserError], pack_length: int | None, processor: Processor, split: SequenceSplit
) -> MicroBatch | UserError:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    whole = micro_batch(
        [sample for sample in samples if isinstance(sample, Sample)],
        pack_length,
        processor.tokenizer.pad_token_id,
        processor.image_token_id,
        multiple=split.parts,
    )
    batch = part_of(whole, split, processor)
    try:
        return batch if get_worker_info() is None else batch.share_memory()
    except RuntimeError as error:
        return UserError(f"data.workers: {_TOO_LITTLE} ({error})")


def micro_batch(
    samples: Sequence[Sample], pack_length: int | None, pad_token_id: int, image_token_id: int, multiple: int = 1
) -> MicroBatch:
    """Samples as one forward pass: packed into a row of `pack_length` tokens or, where that is None, padded.

    Args:
        multiple: rows are padded until their length is one of this number.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    row = max(lengths) if pack_length is None else pack_length
    row = -(-row // multiple) * multiple
    if pack_length is None:
        tensors = collate(samples, pad_token_id, row)
        sequences = [part for length in lengths for part in (length, row - length)]
    else:
        tensors = pack(samples, row, pad_token_id)
        sequences = [*lengths, row - sum(lengths)]
    # Padding is a sequence of its own: nothing attends to it, and no mask has to be read back from the device.
    sizes = tensors.pop("image_sizes", None)
    positions = torch.cat([torch.arange(length) for length in sequences])
    tensors["position_ids"] = positions.view_as(tensors["input_ids"])
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    tensors["supervised_positions"] = _supervised_positions(tensors["labels"])
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
        tokens_per_image=tuple(count for sample in samples for count in sample.tokens_per_image or ()) or None,
    )


def part_of(batch: MicroBatch, split: SequenceSplit, processor: Processor) -> MicroBatch:
    """A part of every row, and of the images those that have tokens in it.

    An image at a border belongs to both parts: each encodes it, and takes the tokens that it has places for.

    Args:
        batch: whole rows, their length a multiple of the number of parts.
        processor: says how many tokens, and tiles, an image has.
    """
    if split.parts == 1:
        return batch
    rows, length = batch.tensors["input_ids"].shape
    size = length // split.parts
    start = split.index * size
    columns = slice(start, start + size)
    # Copies: a worker sends what a tensor is a view of.
    tensors = {
        name: batch.tensors[name][:, columns].clone() for name in ("input_ids", "position_ids", "attention_mask")
    }
    # The part's last token predicts the first one of the next.
    tensors["labels"] = batch.tensors["labels"][:, start : start + size + 1].clone()
    tensors["supervised_positions"] = _supervised_positions(tensors["labels"])
    images, kept = _images_in(batch, start, size, processor)
    lengths = batch.sample_lengths if rows > 1 else (sum(batch.sample_lengths),)
    return replace(
        batch,
        tensors=tensors | images,
        image_sizes=_chosen(batch.image_sizes, kept),
        tokens_per_image=_chosen(batch.tokens_per_image, kept),
        supervised_tokens=len(tensors["supervised_positions"]),
        replaced=batch.replaced if split.index == 0 else (),
        parts=split.parts,
        part_tokens=sum(min(max(each - start, 0), size) for each in lengths),
    )


def _chosen(values: tuple[_Value, ...] | None, kept: list[int]) -> tuple[_Value, ...] | None:
    return tuple(values[number] for number in kept) or None if values is not None else None


def _images_in(
    batch: MicroBatch, start: int, size: int, processor: Processor
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The images with tokens in columns `start` to `start + size` of a batch, and which of the batch's they are."""
    if "image_positions" not in batch.tensors:
        return {}, []
    if batch.tokens_per_image is not None:
        tokens, tiles = list(batch.tokens_per_image), [1] * batch.images
    elif batch.image_sizes is None:
        tokens, tiles = [processor.num_image_tokens] * batch.images, [1] * batch.images
    else:
        tokens = [processor.count_image_tokens(each) for each in batch.image_sizes]
        tiles = [processor.tiling.num_tiles(each) for each in batch.image_sizes]
    positions, length = batch.tensors["image_positions"], batch.tensors["input_ids"].shape[1]
    row, column = positions // length, positions % length
    inside = (column >= start) & (column < start + size)
    of_image = torch.arange(len(tokens)).repeat_interleave(torch.tensor(tokens))
    kept = of_image[inside].unique()
    if not len(kept):
        return {}, []
    of_tile = torch.arange(len(tiles)).repeat_interleave(torch.tensor(tiles))
    pixels = {
        name: batch.tensors[name][torch.isin(of_tile, kept)]
        for name in ("pixel_values", "vision_features")
        if name in batch.tensors
    }
    places = {
        "image_positions": row[inside] * size + column[inside] - start,
        "image_tokens": inside[torch.isin(of_image, kept)].nonzero().flatten(),
    }
    return pixels | places, kept.tolist()


def _supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    return (labels[:, 1:].flatten() != IGNORE_INDEX).nonzero().flatten()
