"""Training records, from whatever file they come, checked before anything is computed from them.

The native form is LLaVA's: a JSON list of records, or one per line (.jsonl)::

    {"id": "0017", "image": "coco/0017.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                               {"from": "gpt", "value": "A cat."}]}

`image` (or `images`) is absent for text, one path, or a list of paths, each with its own `<image>` in the human turns.
`message_forms.py` lists the other forms that are read, `tables.py` Parquet and `datasets` folders, `archives.py` images
in tar and zip files. Every defect is a `UserError` that names the file, the record's position and id, the field, the
value and the fix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_npu.data.formats.archives import is_archive, open_archive
from llava_npu.data.formats.parsing import Record, RecordSequence, parse_record
from llava_npu.data.formats.record_files import Entries, JsonEntries
from llava_npu.data.formats.tables import TableEntries, is_table, table_files
from llava_npu.data.image_roots import ImageFolder, ImageRoot
from llava_npu.data.mixtures import Mixture, MixturePart
from llava_npu.errors import UserError
from llava_npu.files.home import expand_home


@dataclass(frozen=True)
class Source:
    """One data file of a run.

    Args:
        path: see `open_records`.
        image_root: the folder of the images, or an archive of them; by default the data file's own folder.
        weight, limit: see `mixtures.MixturePart`.
        allow_absolute_paths: image names and links may lead out of the folder.
    """

    path: str | Path
    image_root: str | Path | None = None
    weight: float = 1.0
    limit: int | None = None
    allow_absolute_paths: bool = False


class Records(RecordSequence):
    """The records of one file, each read and checked when asked for; none is kept.

    Indexing raises `RecordError` for a record that cannot be trained on.
    """

    def __init__(self, entries: Entries, image_root: ImageRoot) -> None:
        self.entries = entries
        self.image_root = image_root

    def __len__(self) -> int:
        return len(self.entries)

    def _record(self, index: int) -> Record:
        origin, entry = self.entries[index]
        return parse_record(entry, index, origin, self.image_root)


def open_records(
    path: str | Path, image_root: str | Path | None = None, *, allow_absolute_paths: bool = False
) -> Records:
    """Opens a data file of any size without reading its records.

    Args:
        path: a JSON list; one JSON object per line where the name ends in .jsonl or .ndjson; Parquet, or a folder of
            it; a folder that `Dataset.save_to_disk` wrote.
        image_root: the folder of the images, or a .tar or .zip file of them; by default the data file's own folder.
        allow_absolute_paths: image names may be absolute, and links may lead out of the folder.

    Raises:
        UserError: the file cannot be read, is not of that form or is empty.
    """
    path = expand_home(path)
    image_root = None if image_root is None else expand_home(image_root)
    entries: Entries = TableEntries(path) if is_table(path) else JsonEntries(path)
    if image_root is not None and is_archive(image_root):
        return Records(entries, open_archive(image_root))
    folder = image_root if image_root is not None else (path if path.is_dir() else path.parent)
    return Records(entries, ImageFolder(folder, allow_absolute_paths))


def load_records(
    path: str | Path, image_root: str | Path | None = None, *, allow_absolute_paths: bool = False
) -> list[Record]:
    """Reads and checks a whole data file at once: a fault in record 400,000 is found now, not after a day of training.

    Args:
        path, image_root, allow_absolute_paths: see `open_records`.

    Raises:
        UserError: the file cannot be read, or a record is wrong; images themselves are opened later.
    """
    return list(open_records(path, image_root, allow_absolute_paths=allow_absolute_paths))


def open_sources(sources: Sequence[Source]) -> Sequence[Record]:
    """The samples of one epoch over all sources, by their weights and limits."""
    parts = [
        MixturePart(
            open_records(source.path, source.image_root, allow_absolute_paths=source.allow_absolute_paths),
            source.weight,
            source.limit,
        )
        for source in sources
    ]
    if len(parts) == 1 and parts[0].weight == 1 and parts[0].limit is None:
        return parts[0].records
    return Mixture(parts)


def fingerprint(*paths: str | Path) -> str:
    """The data's content as 'sha256:…': equal when, and only when, the data is the same, wherever the files lie."""
    files = [file for path in paths for file in _files(expand_home(path))]
    digests = [_digest(file) for file in files]
    if len(digests) == 1:
        return f"sha256:{digests[0]}"
    return f"sha256:{hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


def _files(path: Path) -> list[Path]:
    return table_files(path) if is_table(path) else [path]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file: {error.strerror or error}") from error
