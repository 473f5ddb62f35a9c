"""Rows of Parquet files as the data sets on Hugging Face have them: texts, numbers, lists and encoded images.

A data set in several files ("test-00000-of-00003.parquet" and on) is read as a whole from its first.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from llava_npu.data.formats.tables import require_pyarrow
from llava_npu.data.image_sources import EmbeddedImage
from llava_npu.errors import UserError
from llava_npu.evaluation.formats.json_files import JsonRecord, combined_digest

_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<hash>-[0-9a-f]+)?\.parquet")
_ROWS_PER_BATCH = 256


def read_parquet(path: Path) -> tuple[list[JsonRecord], str]:
    """The rows of a Parquet file and of those that belong with it, and their SHA-256.

    Images become `EmbeddedImage`s, equal ones held once (see `record_image`).

    Raises:
        UserError: pyarrow is not installed; a file is missing, damaged or empty.
    """
    require_pyarrow(path)
    records: list[JsonRecord] = []
    digests = []
    shared: dict[str, EmbeddedImage] = {}
    for file in _files_of(path):
        digests.append(_sha256(file))
        for number, row in enumerate(_rows(file), start=1):
            place = f"row {number}"
            cells = {column: _with_images(cell, f"{file}, {place}, {column}", shared) for column, cell in row.items()}
            records.append(JsonRecord(cells, file, place))
    if not records:
        raise UserError(f"{path} holds no rows.")
    return records, combined_digest(digests)


def record_image(record: JsonRecord, column: str = "image") -> EmbeddedImage:
    """The image in a column of a row.

    Raises:
        UserError: there is none.
    """
    image = record.values.get(column)
    if not isinstance(image, EmbeddedImage):
        raise record.error(column, "an encoded image is expected ({bytes, path}).")
    return image


def _files_of(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    files = []
    for number in range(count):
        found = sorted(path.parent.glob(f"{match['name']}-{number:05}-of-{match['count']}*.parquet"))
        if not found:
            raise UserError(f"{path}: file {number + 1} of {count} is missing in {path.parent}. Download all of them.")
        files.append(found[0])
    return files


def _rows(file: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as source:
            for batch in source.iter_batches(_ROWS_PER_BATCH, use_threads=False):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a Parquet file, or a damaged one: {error}") from error


def _with_images(cell: Any, origin: str, shared: dict[str, EmbeddedImage]) -> Any:
    if isinstance(cell, dict) and set(cell) == {"bytes", "path"}:
        return _with_images(cell["bytes"], origin, shared)
    if isinstance(cell, bytes):
        key = hashlib.sha256(cell).hexdigest()
        return shared.setdefault(key, EmbeddedImage(key, cell, origin))
    if isinstance(cell, list):
        return [_with_images(item, origin, shared) for item in cell]
    return cell


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
