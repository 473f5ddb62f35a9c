"""How many tokens and images each sample has, counted without decoding an image, once per data set and tokenizer.

The counts are two small files in the user's cache (8 bytes per record), under a name made of all that they depend on.
They are read like any file: mapped, not loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_npu.data.conversation.labels import ExpandedConversation
from llava_npu.data.dataset import ConversationDataset, substitutes
from llava_npu.data.packing import TokenCounts
from llava_npu.distributed.cores import usable_cores
from llava_npu.distributed.pools import worker_pool
from llava_npu.errors import UserError
from llava_npu.files.cache import build_once, cache_root

# Part of the cache's name: raise it when the same record is encoded otherwise than before.
FORMAT = 1
# Fewer records are counted before other processes would have started.
ALONE_BELOW = 4096
_CHUNK = 512

Counts = NDArray[np.int32]  # (records, 2): tokens and images of each


def load_token_counts(
    dataset: ConversationDataset,
    data: Sequence[Any],
    *,
    workers: int = 0,
    report: Callable[[int], None] = lambda count: None,
) -> TokenCounts:
    """The counts of a data set, from the cache if they were made before.

    Several processes may ask at the same time: one counts, the others wait for it.

    Args:
        dataset: with `bad_samples` 'skip', a record that cannot be encoded counts as what stands in for it.
        data: what says whether it is the same data: fingerprints, and what a mixture takes of them.
        workers: processes to share the work; 0: this one does it.
        report: is told how many more records are counted.

    Raises:
        UserError: a record cannot be encoded and `bad_samples` is 'error'; or the cache cannot be written.
    """
    folder = cache_root() / "token-counts" / _key(dataset, data)

    def build(target: Path) -> None:
        counts = np.concatenate(list(_count_all(dataset, workers, report)))
        np.save(target / "tokens.npy", counts[:, 0])
        np.save(target / "images.npy", counts[:, 1])

    build_once(folder, build, lambda folder: _read(folder, len(dataset)) is not None)
    counts = _read(folder, len(dataset))
    assert counts is not None
    return counts


def _read(folder: Path, num_records: int) -> TokenCounts | None:
    """The counts in a folder; None if they are damaged."""
    try:
        tokens, images = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "images"))
    except (OSError, ValueError, EOFError):
        return None
    return TokenCounts(tokens, images) if tokens.shape == images.shape == (num_records,) else None


def default_workers(num_records: int) -> int:
    """One process per core, or none for a set that is counted before they have started."""
    return 0 if num_records < ALONE_BELOW else usable_cores()


def _key(dataset: ConversationDataset, data: Sequence[Any]) -> str:
    processor, tokenizer = dataset.processor, dataset.processor.tokenizer
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    recipe = {
        "format": FORMAT,
        "data": data,
        "records": len(dataset),
        "bad_samples": dataset.bad_samples,
        "template": dataset.template,
        "max_length": dataset.max_length,
        "tokenizer": [type(tokenizer).__name__, words, tokenizer.special_tokens_map, tokenizer.chat_template],
        "image_tokens": repr(dataset.image_tokens) if dataset.image_tokens else processor.num_image_tokens,
        "tiling": repr(processor.tiling),
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _count_all(dataset: ConversationDataset, workers: int, report: Callable[[int], None]) -> Iterator[Counts]:
    stretches = [range(start, min(start + _CHUNK, len(dataset))) for start in range(0, len(dataset), _CHUNK)]
    if not workers:
        yield from _reported((_count(dataset, stretch) for stretch in stretches), report)
        return
    text_only = ConversationDataset(  # features know every image's file by now: nothing to send to other processes
        dataset.records,
        dataset.processor,
        dataset.template,
        dataset.max_length,
        bad_samples=dataset.bad_samples,
        image_tokens=dataset.image_tokens,
    )
    with worker_pool(workers, _start_worker, text_only) as pool:
        yield from _reported(pool.map(_count_in_worker, stretches), report)


def _reported(counts: Iterator[Counts], report: Callable[[int], None]) -> Iterator[Counts]:
    for of_stretch in counts:
        report(len(of_stretch))
        yield of_stretch


def _count(dataset: ConversationDataset, stretch: range) -> Counts:
    return np.array([_count_one(dataset, index) for index in stretch], dtype=np.int32)


def _count_one(dataset: ConversationDataset, index: int) -> tuple[int, int]:
    try:
        _, encoded = dataset.encode(index)
    except UserError as error:
        if dataset.bad_samples == "error":
            raise
        encoded = _substitute(dataset, index, error)
    return len(encoded.input_ids), encoded.num_images


def _substitute(dataset: ConversationDataset, index: int, problem: UserError) -> ExpandedConversation:
    for substitute in substitutes(index, len(dataset.records)):
        try:
            return dataset.encode(substitute)[1]
        except UserError:
            continue
    raise problem  # loading will say the same, and more


_dataset: ConversationDataset | None = None  # a worker's own


def _start_worker(dataset: ConversationDataset) -> None:
    global _dataset
    _dataset = dataset


def _count_in_worker(stretch: range) -> Counts:
    assert _dataset is not None
    return _count(_dataset, stretch)
