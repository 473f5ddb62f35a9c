"""Questions of a tab-separated benchmark, and their images: in base64, by reference to another row, or in files.

image       an image in base64; or, in at most 64 characters, the index of the row that holds it; or a list of
            either, ['…', '…'], where a question has several (as in VLMEvalKit's MMMU file).
image_path  image files below the table's folder, where `image` is empty: one, or a list.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Any

from llava_npu.data.image_sources import EmbeddedImage, ImageFile, ImageSource
from llava_npu.evaluation.formats.locating import path_inside
from llava_npu.evaluation.formats.tables import Row, Table, missing_column
from llava_npu.evaluation.questions import Question

_MAX_REFERENCE = 64  # characters; a longer `image` is an image


def table_question(row: Row, images: TableImages, **more: Any) -> Question:
    """The question of a row, with VLMEvalKit's names of columns.

    Args:
        row: the row.
        images: of its table.
        more: other attributes of the question, or replacements of those that the row gives.

    Raises:
        UserError: the row has no question, or its image cannot be read.
    """
    # Not stripped: the prompt is the file's text to the last space, as in the original scripts.
    text = row.text("question")
    if not text:
        raise row.error("question", "empty.")
    given = {
        "id": row.label("index"),
        "text": text,
        "prompt": text,
        "images": images.of(row),
        "group": row.label("index"),
        "category": row.label("category"),
        "l2_category": row.label("l2-category") or row.label("l2_category"),
        "split": row.label("split"),
    }
    return Question(**{**given, **more})


class TableImages:
    """The images of a table; equal ones are held once."""

    def __init__(self, table: Table):
        """
        Raises:
            UserError: the table has no column for images.
        """
        if not {"image", "image_path"} & set(table.columns):
            raise missing_column(table.path, table.columns, "image", "image_path")
        self._by_index = {row.label("index"): row for row in table.rows}
        self._shared: dict[str, EmbeddedImage] = {}

    def of(self, row: Row) -> tuple[ImageSource, ...]:
        """The images of a row, in order; none if both cells are empty.

        Raises:
            UserError: unreadable base64, a reference to nothing, a path that leaves the table's folder.
        """
        value = row.label("image")
        if not value:
            return self._from_path(row)
        return tuple(self._embedded(row, part) for part in _parts(row, "image", value))

    def _embedded(self, row: Row, value: str) -> EmbeddedImage:
        if len(value) <= _MAX_REFERENCE:
            row, value = self._holder(row, value)
        try:
            data = base64.b64decode("".join(value.split()), validate=True)
        except binascii.Error as error:
            raise row.error("image", f"unreadable base64 ({error}); it starts with {value[:30]!r}.") from error
        key = hashlib.sha256(data).hexdigest()
        return self._shared.setdefault(key, EmbeddedImage(key, data, f"{row.file}, row {row.number}, column 'image'"))

    def _holder(self, row: Row, value: str) -> tuple[Row, str]:
        holder = self._by_index.get(value)
        if holder is None:
            raise row.error("image", f"{value!r} is neither an image in base64 nor the index of a row that holds one.")
        held = _parts(holder, "image", holder.label("image"))
        if len(held) != 1 or len(held[0]) <= _MAX_REFERENCE:
            raise row.error("image", f"refers to row {holder.number} (index {value}), which holds no image itself.")
        return holder, held[0]

    def _from_path(self, row: Row) -> tuple[ImageSource, ...]:
        value = row.label("image_path")
        if not value:
            return ()
        root = row.file.parent.resolve()
        images = []
        for part in _parts(row, "image_path", value):
            path = path_inside(root, part)
            if path is None:
                raise row.error("image_path", f"{part!r} leads out of the table's folder {root}.")
            images.append(ImageFile(path, f"{row.file}, row {row.number}, column 'image_path'"))
        return tuple(images)


def _parts(row: Row, column: str, value: str) -> Sequence[str]:
    return parse_list(row, column, value) if value.startswith("[") else (value,)


def parse_list(row: Row, column: str, value: str) -> tuple[str, ...]:
    """The texts of a cell that holds a list, as Python or JSON writes it: ['a', 'b'] or ["a", "b"]."""
    try:
        parsed = ast.literal_eval(value)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise row.error(column, f"begins with '[' but is not a list: {value[:60]!r}.") from error
    if not isinstance(parsed, list) or not all(isinstance(item, str | int | float) for item in parsed):
        raise row.error(column, f"is not a list of strings: {value[:60]!r}.")
    return tuple(str(item) for item in parsed)
