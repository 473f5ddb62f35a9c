"""Parquet files and `datasets` folders as records, with images in the table or named by it.

What is read at random has to be in Arrow's own layout: a `datasets` folder (`save_to_disk`) does and is mapped as it
is; Parquet, which is compressed in blocks of many rows, is written out once to the user's cache, as `datasets` does.
Either way rows stay on disk until asked for. Images may be paths, bytes, or `datasets` images ({"bytes", "path"}).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from llava_npu.data.formats.message_forms import CONVERSATION_KEYS
from llava_npu.errors import UserError
from llava_npu.files.cache import build_once, cache_root

TABLE_SUFFIXES = (".parquet", ".arrow")
IMAGE_COLUMNS = ("image", "images")
_TABLE = "table.arrow"
_TABLE_FORMAT = 2
_ROWS_PER_BATCH = 1024
_SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}")
_WHOLE_SPLIT = re.compile(r"train(ing)?|test(ing)?|val(id|idation)?|dev|eval")


@dataclass(frozen=True, slots=True)
class TableImage:
    """An image whose bytes are in a table (Parquet, Arrow), next to the text.

    Args:
        table: the Arrow file.
        row: of the table.
        column: 'image' or 'images'.
        number: which of the row's list; None where the cell is one image.
        origin: the row's place in the file that the user gave, for messages.
    """

    table: Path
    row: int
    column: str
    number: int | None
    origin: str

    def __str__(self) -> str:
        return f"{self.origin}, {self.column}" + ("" if self.number is None else f"[{self.number}]")

    def read_bytes(self) -> bytes:
        return read_image(self.table, self.row, self.column, self.number)

    def is_file(self) -> bool:
        return self.table.is_file()


class TableEntries:
    """The rows of one or more tables, one after the other.

    Args:
        path: a .parquet or .arrow file, several by a `*` in the last part of the path, a folder of Parquet files, or
            one that `Dataset.save_to_disk` wrote.

    Raises:
        UserError: pyarrow is missing, no table is found, several splits are mixed, or a table holds no conversations.
    """

    def __init__(self, path: Path):
        require_pyarrow(path)
        self.path = path
        self.files = table_files(path)
        self._arrow_files = [_as_arrow(file) for file in self.files]
        lengths = []
        for file, arrow_file in zip(self.files, self._arrow_files, strict=True):
            table = _open(arrow_file, os.getpid())
            if not set(CONVERSATION_KEYS) & set(table.column_names):
                raise UserError(
                    f"{file}: no conversations: its columns are {', '.join(table.column_names)}; one of them has to be "
                    f"{', '.join(CONVERSATION_KEYS)}"
                )
            lengths.append(table.num_rows)
        self._ends = list(accumulate(lengths))
        if not self._ends[-1]:
            raise UserError(f"{path}: no records in this table")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        origin = f"{self.files[number]}:row {row}"
        table = _open(self._arrow_files[number], os.getpid())
        entry: dict[str, Any] = {}
        for name in table.column_names:
            cell = table[name][row]
            # Only the text is read here: an image's bytes when it is asked for.
            entry[name] = (
                _images(cell, partial(TableImage, self._arrow_files[number], row, name, origin=origin))
                if name in IMAGE_COLUMNS
                else cell.as_py()
            )
        return origin, entry


def is_table(path: Path) -> bool:
    """Whether this is a table or a folder of tables, by its name alone where it is a file."""
    return path.suffix.lower() in TABLE_SUFFIXES or path.is_dir()


def table_files(path: Path) -> list[Path]:
    """The files behind a path, in the order of their rows."""
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise UserError(f"{path}: no file matches")
        return files
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if (each / "state.json").is_file())
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; give the folder of one: {path / splits[0]}")
    if (path / "state.json").is_file():
        return [path / name for name in _saved_files(path / "state.json")]
    files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not files:
        raise UserError(
            f"{path}: cannot read the data file: it is a folder, and holds neither Parquet files nor a saved dataset"
        )
    found = {match[1]: f"{match[1]}-*.parquet" for file in files if (match := _SPLIT.match(file.name))}
    found |= {file.stem: file.name for file in files if _WHOLE_SPLIT.fullmatch(file.stem)}
    if len(found) > 1:
        one = files[0].parent / found[max(found)]
        raise UserError(f"{path}: holds the splits {', '.join(sorted(found))}; give the files of one, as in {one}")
    return files


def read_image(table: Path, row: int, column: str, number: int | None) -> bytes:
    """The bytes of one embedded image.

    Raises:
        OSError: the table is gone or damaged.
    """
    try:
        cell = _open(table, os.getpid())[column][row]
    except UserError as error:
        raise OSError(errno.EIO, str(error)) from error
    item = cell if number is None else cell.values[number]
    return bytes((item["bytes"] if hasattr(item, "keys") else item).as_py())


def _images(cell: Any, embedded: Any) -> Any:
    """A cell as `parse_record` takes it: paths stay texts, bytes become `TableImage`s."""
    if not cell.is_valid:
        return None
    if hasattr(cell, "values") and not hasattr(cell, "keys"):  # a list
        return [_image(cell.values[i], partial(embedded, number=i)) for i in range(len(cell.values))]
    return _image(cell, partial(embedded, number=None))


def _image(item: Any, embedded: Any) -> Any:
    import pyarrow

    if not item.is_valid:
        return None
    if isinstance(item, pyarrow.StructScalar):
        fields = set(item.keys())
        if "bytes" in fields and item["bytes"].is_valid:
            return embedded()
        return item["path"].as_py() if "path" in fields else item.as_py()
    if isinstance(item, pyarrow.BinaryScalar) and not isinstance(item, pyarrow.StringScalar):
        return embedded()
    return item.as_py()


def _as_arrow(file: Path) -> Path:
    """The table in Arrow's layout: the file itself, or its copy in the cache."""
    if file.suffix.lower() != ".parquet":
        return file
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot read the data file: {error.strerror or error}") from error
    identity = [_TABLE_FORMAT, str(file.resolve()), status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    return build_once(cache_root() / "tables" / key, partial(_convert, file)) / _TABLE


def _convert(file: Path, folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        # All columns: what a record must not hold ("rejected", "tools") is seen only where it is kept.
        with (
            parquet.ParquetFile(file) as source,
            pyarrow.OSFile(str(folder / _TABLE), "wb") as sink,
            pyarrow.ipc.new_file(sink, source.schema_arrow) as writer,
        ):
            for batch in source.iter_batches(_ROWS_PER_BATCH, use_threads=False):
                writer.write_batch(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a Parquet file, or a damaged one: {error}") from error


@lru_cache(maxsize=512)
def _open(file: Path, process: int) -> Any:
    """The memory-mapped table."""
    import pyarrow

    try:
        source = pyarrow.memory_map(str(file))
        try:
            return pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:  # `datasets` writes Arrow's stream form
            source.seek(0)
            return pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot read the data file as an Arrow table: {error}") from error


def _saved_files(state: Path) -> Sequence[str]:
    try:
        values = json.loads(state.read_text())
        if values.get("_indices_data_files"):  # of `datasets` 1, after select or shuffle
            raise ValueError("an index says which of the rows are meant, and in which order")
        return [Path(file["filename"]).name for file in values["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{state}: not what Dataset.save_to_disk writes ({error}); save the dataset again") from error


def require_pyarrow(path: Path) -> None:
    """Raises `UserError` where pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet and Arrow needs pyarrow: pip install 'llava-npu[data]'") from error
