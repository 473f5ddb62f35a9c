"""Adapters and their base as one plain checkpoint."""

from __future__ import annotations

from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_folder
from llava_npu.models.adapters import is_adapter_folder
from llava_npu.models.loading import load, resolve


def merge(source: str, output: Path) -> None:
    """Writes the model of a folder with adapters as one that needs no other, in the number type of its base checkpoint.

    Raises:
        UserError: `source` has no adapters or cannot be loaded, or `output` is there already.
    """
    folder = resolve(source)
    if not is_adapter_folder(Path(folder)):
        raise UserError(f"merge: {folder} has no adapters; it is a plain model already, or none.")
    if output.exists():
        raise UserError(f"merge: {output} is there already; name a new folder.")
    loaded = load(folder)
    write_folder(output, loaded.save_pretrained)
