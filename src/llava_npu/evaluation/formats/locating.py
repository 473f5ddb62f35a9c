"""Finding a benchmark's files: the question file in a data folder, its companion files, and its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_npu.data.image_sources import ImageFile
from llava_npu.errors import UserError
from llava_npu.evaluation.formats.json_files import JsonRecord
from llava_npu.evaluation.questions import Dataset


def find_data(name: str, patterns: Sequence[str], path: Path) -> Path:
    """The question file of a benchmark: `path` itself, or the first pattern found below it if it is a folder.

    Args:
        name: of the benchmark, for messages.
        patterns: glob patterns relative to a data folder, the preferred one first.
        path: a file or a folder.

    Raises:
        UserError: no such file, nothing found, or one pattern found several files.
    """
    if not path.is_dir():
        return path
    if not patterns:
        raise UserError(f"{path} is a folder; {name} reads a file of your own: name it.")
    for pattern in patterns:
        found = sorted(match for match in path.glob(pattern) if match.is_file())
        if len(found) > 1:
            listed = ", ".join(match.name for match in found)
            raise UserError(f"{path} holds several files for {name}: {listed}. Name one of them.")
        if found:
            return found[0]
    raise UserError(f"{path} holds no file for {name}. Looked for: {', '.join(patterns)}.")


def companion_file(file: Path, candidates: Sequence[str]) -> Path | None:
    """The first of the paths, relative to the file's folder, that exists."""
    return next((file.parent / name for name in candidates if (file.parent / name).exists()), None)


def require_companion(file: Path, candidates: Sequence[str], what: str) -> Path:
    """As `companion_file`, or `UserError`."""
    found = companion_file(file, candidates)
    if found is None:
        raise UserError(f"{file} needs {what} next to it. Looked in {file.parent} for: {', '.join(candidates)}.")
    return found


def check_images(dataset: Dataset) -> None:
    """Raises `UserError` if not one of a dataset's image files is there: a folder is missing, not an image."""
    files = [image for question in dataset.questions for image in question.images if isinstance(image, ImageFile)]
    if files and not any(image.path.is_file() for image in files):
        raise UserError(
            f"{dataset.path}: none of its {len(files)} images is there. The first is looked for at {files[0].path}."
        )


def path_inside(root: Path, name: str) -> Path | None:
    """The path of a file below the resolved folder `root`; None if its name leads out of it, or nowhere."""
    try:
        path = (root / name).resolve()
    except (RuntimeError, ValueError, OSError):  # links in a circle, a null byte, too long a name
        return None
    return path if path.is_relative_to(root) else None


class QuestionImages:
    """The folder of the images that a question file names."""

    def __init__(self, file: Path, candidates: Sequence[str]):
        """
        Args:
            file: the question file.
            candidates: folders relative to its own, the preferred one first. A link to a folder elsewhere is followed.
        """
        self._root = require_companion(file, candidates, "a folder of images").resolve()

    def image(self, record: JsonRecord, field: str = "image") -> ImageFile:
        """The image that a field names. Whether it can be read shows when it is opened.

        Raises:
            UserError: the field is missing, or leads out of the folder.
        """
        value = record.need(field)
        path = path_inside(self._root, value)
        if path is None:
            raise record.error(field, f"{value!r} leads out of the image folder {self._root}.")
        return ImageFile(path, f"{record.file}, {record.place}")
