"""The whole data set, checked as training would read it, before training does.

Every record is parsed, its images are found and decoded, and, given a tokenizer, it is encoded and measured: what
`ConversationDataset` does, but all defects are collected and counted. Processes share out the records; nothing but
counts, a few examples and sixteen bytes per record comes back from them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llava_npu.data.conversation.labels import IMAGE_PLACEHOLDER, encode_conversation, expand_images
from llava_npu.data.conversation.templates import get_template, is_empty
from llava_npu.data.formats.parsing import Record
from llava_npu.data.formats.tables import TableImage
from llava_npu.data.image_roots import ImagePath, exists
from llava_npu.data.images import load_image
from llava_npu.data.tools.defects import Kind, RecordError
from llava_npu.distributed.cores import usable_cores
from llava_npu.distributed.pools import worker_pool
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_npu.files.atomic import write_text
from llava_npu.files.untrusted import printable

Images = Literal["decode", "exist", "ignore"]
# What does not stop training: it continues with less text, or sees a sample twice.
WARNINGS: frozenset[Kind] = frozenset({"text cut off", "duplicate sample", "duplicate id"})
_CHUNK = 256


@dataclass(frozen=True)
class CheckOptions:
    """What to check.

    Args:
        images: 'decode' opens every image, 'exist' only looks for it.
        template: the conversation template.
        tokenizer: folder or hub id; None: texts are not encoded, so lengths and markup in them are not checked.
        max_length: tokens of a sample, images included.
        image_tokens: tokens of an image.
        examples: how many defects of each kind to describe.
    """

    images: Images = "decode"
    template: str = "v1"
    tokenizer: str | None = None
    max_length: int | None = None
    image_tokens: int = 0
    examples: int = 5


@dataclass(frozen=True)
class DefectSummary:
    """Defects of one kind: how many, and the first of them in the order of the data."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Args:
        num_bad: records that cannot be trained on.
        longest: tokens of the longest sample, uncut; None without a tokenizer.
    """

    num_records: int
    num_bad: int
    num_images: int
    longest: int | None
    findings: dict[Kind, DefectSummary]

    def as_json(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return {
            "records": self.num_records,
            "bad_records": self.num_bad,
            "images": self.num_images,
            "longest_sample_tokens": self.longest,
            "findings": {
                kind: {
                    "severity": "warning" if kind in WARNINGS else "error",
                    "count": found.count,
                    "examples": list(found.examples),
                }
                for kind, found in self.findings.items()
            },
        }


@dataclass
class _Tally:
    """What one stretch of records gave; digests are of each record's content and id, (records, 2)."""

    counts: Counter[Kind] = field(default_factory=Counter)
    examples: defaultdict[Kind, list[str]] = field(default_factory=lambda: defaultdict(list))
    num_bad: int = 0
    num_images: int = 0
    longest: int = 0
    digests: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint64))

    def add(self, kind: Kind, message: str, limit: int) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < limit:
            self.examples[kind].append(message)


def check_records(
    sources: Sequence[Sequence[Record]],
    options: CheckOptions,
    *,
    workers: int = 0,
    report: Callable[[int], None] = lambda count: None,
) -> CheckReport:
    """Checks all records of all sources.

    Args:
        sources: from `open_records`.
        workers: processes to share the work; 0: this one does it.
        report: is told how many more records are done.

    Raises:
        UserError: an option is wrong; what is wrong with the data is in the report.
    """
    get_template(options.template)
    stretches = [
        (number, start, min(start + _CHUNK, len(records)))
        for number, records in enumerate(sources)
        for start in range(0, len(records), _CHUNK)
    ]
    total = _Tally()
    digests = []
    for (_, start, stop), tally in zip(stretches, _run(sources, options, stretches, workers), strict=True):
        total.counts += tally.counts
        for kind, messages in tally.examples.items():
            total.examples[kind] += messages[: options.examples - len(total.examples[kind])]
        total.num_bad += tally.num_bad
        total.num_images += tally.num_images
        total.longest = max(total.longest, tally.longest)
        digests.append(tally.digests)
        report(stop - start)
    _find_duplicates(np.concatenate(digests), sources, total, options.examples)
    return CheckReport(
        num_records=sum(map(len, sources)),
        num_bad=total.num_bad,
        num_images=total.num_images,
        longest=total.longest if options.tokenizer else None,
        findings={
            kind: DefectSummary(count, tuple(total.examples[kind])) for kind, count in total.counts.most_common()
        },
    )


def default_workers(num_records: int) -> int:
    """One process per core, or none for a set that is checked before they have started."""
    return 0 if num_records < 2048 else usable_cores()


class _Checker:
    def __init__(self, sources: Sequence[Sequence[Record]], options: CheckOptions) -> None:
        self.sources = sources
        self.options = options
        self.template = get_template(options.template)
        self.tokenizer = _load_tokenizer(options.tokenizer) if options.tokenizer else None
        # The same image belongs to many records; whether it is good is found out once.
        self.image_problem = lru_cache(maxsize=1 << 16)(self._image_problem)

    def check(self, source: int, start: int, stop: int) -> _Tally:
        tally = _Tally()
        digests = np.zeros((stop - start, 2), dtype=np.uint64)  # zero: an unreadable record has no duplicate
        for row, index in enumerate(range(start, stop)):
            problems: list[tuple[Kind, str]] = []
            try:
                record = self.sources[source][index]
            except RecordError as error:
                problems.append((error.kind, str(error)))
            else:
                digests[row] = _digests(record, source)
                tally.num_images += len(record.images)
                problems += self._image_problems(record)
                problems += self._text_problems(record, tally)
            tally.num_bad += any(kind not in WARNINGS for kind, _ in problems)
            for kind, message in problems:
                tally.add(kind, message, self.options.examples)
        tally.digests = digests
        return tally

    def _image_problems(self, record: Record) -> Iterator[tuple[Kind, str]]:
        if self.options.images == "ignore":
            return
        try:
            paths = record.image_paths
        except RecordError as error:
            yield error.kind, str(error)
            return
        for path in dict.fromkeys(paths):
            if problem := self.image_problem(path):
                kind, message = problem
                yield kind, f"{record.name}: {message}"

    def _image_problem(self, path: ImagePath) -> tuple[Kind, str] | None:
        if not exists(path):
            return "image missing", f"image {path} does not exist; check the path and image_root"
        if self.options.images == "decode":
            try:
                load_image(path, "")
            except UserError as error:
                return "image unreadable", str(error).removeprefix(": ")
        return None

    def _text_problems(self, record: Record, tally: _Tally) -> Iterator[tuple[Kind, str]]:
        if self.tokenizer is None:
            yield from self._empty_answers(record)
            return
        try:
            encoded = encode_conversation(record.conversations, self.tokenizer, self.template, record=record)
            image_tokens = [self.options.image_tokens] * len(record.images)
            # Without a width an image is left out of the length, not taken for one token.
            length = len(encoded.input_ids) - encoded.input_ids.count(IMAGE_PLACEHOLDER) + sum(image_tokens)
            tally.longest = max(tally.longest, length)
            limit = self.options.max_length
            if limit is not None and length > limit:
                expand_images(encoded, image_tokens, 0, limit, record)
                yield "text cut off", f"{record.name}: {length} tokens; what exceeds {limit} (max_length) is cut off"
        except RecordError as error:
            yield error.kind, str(error)
        except UserError as error:
            yield "not encodable", str(error)

    def _empty_answers(self, record: Record) -> Iterator[tuple[Kind, str]]:
        may_be_open = self.template.empty_answer == "open" and len(record.conversations) <= 2
        for i, turn in enumerate(record.conversations):
            is_allowed = self.template.empty_answer == "keep" or may_be_open
            if turn.role == "gpt" and is_empty(turn.text, self.template) and not is_allowed:
                yield (
                    "empty or unanswerable",
                    f"{record.name}: conversations[{i}].value: the answer is empty; write the answer or remove this "
                    "round",
                )
        opens_with_answer = record.conversations[0].role == "gpt" and not self.template.keeps_opening_answer
        if opens_with_answer and len(record.conversations) == 1:
            yield (
                "empty or unanswerable",
                f"{record.name}: no human turn; a conversation starts with a question",
            )


_checker: _Checker | None = None  # a worker's own


def _start_worker(sources: Sequence[Sequence[Record]], options: CheckOptions) -> None:
    global _checker
    _checker = _Checker(sources, options)


def _check_in_worker(stretch: tuple[int, int, int]) -> _Tally:
    assert _checker is not None
    return _checker.check(*stretch)


def _run(
    sources: Sequence[Sequence[Record]],
    options: CheckOptions,
    stretches: Sequence[tuple[int, int, int]],
    workers: int,
) -> Iterator[_Tally]:
    """The tallies in the order of the stretches, whoever makes them."""
    if not workers:
        checker = _Checker(sources, options)
        yield from (checker.check(*stretch) for stretch in stretches)
        return
    if options.tokenizer:
        _load_tokenizer(options.tokenizer)  # a wrong name is one message here, not a broken pool
    with worker_pool(workers, _start_worker, sources, options) as pool:
        yield from pool.map(_check_in_worker, stretches)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from llava_npu.data.tokenizer import load_tokenizer

    return load_tokenizer(name)


def _digests(record: Record, source: int) -> tuple[int, int]:
    """64 bits of the content, and of the id in its file: chance makes two of ten million alike in 1 of 300,000 sets."""
    images = [_content(image) if isinstance(image, TableImage) else image for image in record.images]
    content = json.dumps([[(turn.role, turn.text) for turn in record.conversations], images]).encode()
    return _digest(content), _digest(f"{source} {record.id}".encode(errors="surrogatepass"))


def _content(image: TableImage) -> str:
    try:
        return hashlib.sha256(image.read_bytes()).hexdigest()
    except OSError:  # found as an unreadable image
        return str(image)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1  # 0 stands for none


def _find_duplicates(
    digests: NDArray[np.uint64], sources: Sequence[Sequence[Record]], total: _Tally, limit: int
) -> None:
    """Counts records that repeat an earlier one: whole, or only by the id, within its file."""
    wholes = _repetitions(digests[:, 0])
    ids = _repetitions(digests[:, 1])
    is_new = ~np.isin(ids[0], wholes[0])
    found: list[tuple[Kind, str, NDArray[np.int64], NDArray[np.int64]]] = [
        ("duplicate sample", "is the same as", *wholes),
        ("duplicate id", "has the id of", ids[0][is_new], ids[1][is_new]),
    ]
    for kind, relation, places, firsts in found:
        if len(places):
            total.counts[kind] += len(places)
        for place, first in zip(places[:limit].tolist(), firsts[:limit].tolist(), strict=True):
            one, other = _record_at(sources, place), _record_at(sources, first)
            total.examples[kind].append(f"{one.name} {relation} {other.origin}")


def _repetitions(digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions whose digest stood before, in order, and where it stood first; zeros do not count."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first_of = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    repeats = ~is_first & (ordered != 0)
    places, firsts = order[repeats], first_of[repeats]
    by_place = np.argsort(places)
    return places[by_place], firsts[by_place]


def _record_at(sources: Sequence[Sequence[Record]], position: int) -> Record:
    ends = list(accumulate(map(len, sources)))
    number = next(i for i, end in enumerate(ends) if position < end)
    return sources[number][position - (ends[number - 1] if number else 0)]


def print_report(report: CheckReport, options: CheckOptions, console: Console) -> None:
    """Counts by kind, examples, and what was not looked at."""
    if report.findings:
        table = Table("defect", "records", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for kind, found in report.findings.items():
            table.add_row(Text(kind, style=_style(kind)), f"{found.count:,}")
        console.print(table)
    for kind, found in report.findings.items():
        console.print(Text(f"\n{kind}", style=f"bold {_style(kind)}"))
        for example in found.examples:
            console.print(Text(f"  {printable(example)}"), soft_wrap=True)
        if found.count > len(found.examples):
            console.print(Text(f"  … and {found.count - len(found.examples):,} more"))
    longest = "" if report.longest is None else f", the longest sample {report.longest:,} tokens"
    bad = "none of them bad" if not report.num_bad else f"{report.num_bad:,} of them cannot be trained on"
    console.print(Text(f"\n{report.num_records:,} records with {report.num_images:,} images{longest}; {bad}"))
    for missing in not_checked(options):
        console.print(Text(f"not checked: {missing}", style="yellow"))


def write_report(report: CheckReport, options: CheckOptions, path: Path) -> None:
    """Writes the report as JSON, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_text(path, json.dumps({**report.as_json(), "not_checked": not_checked(options)}, indent=1) + "\n")


def not_checked(options: CheckOptions) -> list[str]:
    """What these options leave out."""
    missing = []
    if options.images == "ignore":
        missing.append("images (--images ignore)")
    elif options.images == "exist":
        missing.append("whether images can be decoded (--images exist)")
    if options.tokenizer is None:
        missing.append("lengths, and what the template refuses (give --tokenizer)")
    elif options.max_length is None:
        missing.append("whether samples are too long (give --max-length)")
    elif not options.image_tokens and options.images != "ignore":
        missing.append("how much longer images make a sample (give --image-tokens)")
    return missing


def _style(kind: str) -> str:
    return "yellow" if kind in WARNINGS else "red"
