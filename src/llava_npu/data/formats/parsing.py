"""One entry of a data file, checked and made into a `Record`."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from llava_npu.data.conversation.turns import IMAGE_MARK, Turn, parse_turns
from llava_npu.data.formats.message_forms import as_llava
from llava_npu.data.formats.tables import TableImage
from llava_npu.data.image_roots import ImagePath, ImageRoot, check_image_name
from llava_npu.data.tools.defects import RecordError, shown

# Most at the beginning of a line: within one, a text may speak of the HTML element.
_MEDIA_MARK = re.compile(
    r"<(?:video|audio|vid|sound)>[^<>\s]+\.\w{2,4}</"
    r"|^[ \t]*<(?P<kind>video|audio|speech|sound)>|[?.!][ \t]*<(?:video|audio|speech)>[ \t]*$"
    r"|^[ \t]*(?:<(?:Video|VIDEO|Audio|AUDIO)>|<(?:video|audio)/>|\[(?:VIDEO|Video|AUDIO|Audio)\])"
    r"|<\|(?:video|audio|VIDEO|AUDIO)(?:_\w+)?\|>|<(?:video|audio|speech)[ _]?(?:\d+|placeholder)>"
    r"|<(?:Video|Audio|Speech|Sound)Here>|<__(?:video|audio)__>",
    re.MULTILINE,
)
_FOREIGN_IMAGE_MARK = re.compile(
    r"<img>[^<]+</img>|<pic>[^<]+</pic>|\[img\][^\[]+\[/img\]|<\|image\|>|<\|image_\d+\|>"
    r"|<\|(?:image_pad|vision_start)\|>|<image_placeholder>|<ImageHere>|<image_here>|< image ?>|<image >"
    r"|<start_of_image>|<image[ _]?\d+>|<IMG_CONTEXT>|<image_soft_token>|<\|endofimage\|>|<__(?:media|image)__>"
    r"|^[ \t]*(?:<(?:image/|Image|IMAGE|img|picture)>|\[(?:IMG|Image|image)\]|\{image\})"
    r"|^[ \t]*!\[[^\]\n]*\]\([^)\s]+\)[ \t]*$",  # of Markdown, alone on its line
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about zero or more images.

    Args:
        id: the record's own name, for reports.
        conversations: alternating turns.
        images: in the order of their `<image>`s: names as written in the file, relative to `image_root`, or images
            that came with the text.
        origin: where the record stands, e.g. "train.json:record 17" (counted from 0), the opening of every message.
        image_root: the folder or archive that the names in `images` belong to.
    """

    id: str
    conversations: tuple[Turn, ...]
    images: tuple[str | TableImage, ...]
    origin: str
    image_root: ImageRoot

    @property
    def name(self) -> str:
        """The record in an error message: "train.json:record 17 (id '0017')"."""
        return f"{self.origin} (id {self.id!r})"

    @property
    def image_paths(self) -> tuple[ImagePath, ...]:
        """The images' full paths. They never leave `image_root`.

        Raises:
            RecordError: a symbolic link leads out of it.
        """
        return tuple(
            self.image_root.locate(image, self.name) if isinstance(image, str) else image for image in self.images
        )


class RecordSequence(Sequence[Record]):
    """Records that are read when asked for."""

    @abstractmethod
    def _record(self, index: int) -> Record:
        """One of them."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._record(index)


def parse_record(entry: Any, index: int, origin: str, image_root: ImageRoot) -> Record:
    """Checks one entry.

    Args:
        entry: the parsed JSON, or a table's row.
        index: its number, which is its id where it has none.
        origin: the opening of every message.

    Raises:
        RecordError: naming the field, the value and the fix.
    """
    if not isinstance(entry, dict):
        raise RecordError(f"{origin} is {shown(entry)}; a record is an object with 'id', 'conversations' and 'image'")
    identity = entry.get("id")
    if identity is None:
        identity = index
    if not isinstance(identity, str | int):
        raise RecordError(f"{origin}: 'id' is {shown(identity)}; it must be text or a whole number")
    name = f"{origin} (id {str(identity)!r})"
    conversations, images = as_llava(entry, name)
    turns = parse_turns(conversations, name)
    _refuse_foreign_marks(turns, bool(images), name)
    if not any(turn.role == "gpt" and turn.supervised for turn in turns):
        if any(turn.role == "gpt" for turn in turns):
            raise RecordError(
                f"{name}: every answer is excluded from the loss, so there is nothing to learn; remove the record",
                "empty or unanswerable",
            )
        raise RecordError(
            f"{name}: no gpt turn, so there is nothing to learn; add the answer or remove the record",
            "empty or unanswerable",
        )
    for image in images:
        if isinstance(image, TableImage):
            continue
        if not isinstance(image, str) or not image:
            raise RecordError(
                f"{name}: 'image' is {shown(image)}; write one path, a list of paths, or leave the field out"
            )
        check_image_name(image, name, allow_absolute_paths=image_root.allow_absolute_paths)
    _require_matching_marks(turns, images, name)
    return Record(str(identity), turns, tuple(images), origin, image_root)


def _refuse_foreign_marks(turns: Sequence[Turn], has_images: bool, name: str) -> None:
    """Marks of other projects, for what is not read here: the model would learn an answer about what it cannot see."""
    for i, turn in enumerate(turns):
        if turn.role != "human":
            continue
        where = f"{name}: conversations[{i}].value"
        if (mark := _MEDIA_MARK.search(turn.text)) and f"</{mark['kind']}>" not in turn.text:
            raise RecordError(f"{where} contains {mark[0].strip()!r}, but only images are read; remove the record")
        if not has_images and (mark := _FOREIGN_IMAGE_MARK.search(turn.text)):
            raise RecordError(
                f"{where} contains {mark[0].strip()!r}, another project's mark of an image; write '{IMAGE_MARK}' "
                "there, and the image's path into the field 'image'",
                "image count",
            )


def _require_matching_marks(turns: Sequence[Turn], images: Sequence[Any], name: str) -> None:
    """Each image has one `<image>`. LLaVA itself trains on a mismatch by moving images between samples."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks == len(images):
        return
    if not marks:
        fix = f"start the first human turn with '{IMAGE_MARK}\\n'" + (" once per image" if len(images) > 1 else "")
    elif not images:
        fix = "add the 'image' field, or remove the mark from the text"
    else:
        fix = f"write one '{IMAGE_MARK}' per image, in the order of the 'image' list"
    raise RecordError(
        f"{name}: {len(images)} image(s) but {marks} '{IMAGE_MARK}' in the human turns; {fix}", "image count"
    )
