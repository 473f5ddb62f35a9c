"""Shows samples as the model will see them, with the supervised tokens marked: the check before a long run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from llava_npu.data.labels import IGNORE_INDEX, IMAGE_PLACEHOLDER, EncodedConversation, encode_conversation
from llava_npu.data.records import IMAGE_MARK, Record, load_records
from llava_npu.data.templates import get_template
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPERVISED_STYLE = "bold green"
IMAGE_STYLE = "bold magenta"
BRACKETS = ("⟦", "⟧")  # where there is no colour


def inspect_records(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str = "v1",
    image_root: str | Path | None = None,
    limit: int = 5,
    console: Console | None = None,
) -> int:
    """Prints the first `limit` records; supervised text is green, or in ⟦ ⟧ where the output has no colour.

    A record that cannot be encoded is shown with its error, and the rest goes on.

    Returns:
        The number of shown records that cannot be trained on: wrong text, or a missing image.

    Raises:
        UserError: the file cannot be read or holds malformed records, or the template is unknown.
    """
    console = console or Console(highlight=False)
    form = get_template(template)
    records = load_records(path, image_root)
    num_faulty = 0
    for record in islice(records, limit):
        missing = [image for image, full in zip(record.images, record.image_paths, strict=True) if not full.is_file()]
        try:
            encoded = encode_conversation(record.conversations, tokenizer, form, record=record)
        except UserError as error:
            num_faulty += 1
            console.print(Text(f"── {record.name}", style="bold"))
            console.print(Text(f"{error}\n", style="red"), soft_wrap=True)
            continue
        num_faulty += bool(missing)
        console.print(_headline(record, encoded), soft_wrap=True)
        for image in missing:
            console.print(Text(f"missing image: {record.image_root / image}", style="red"), soft_wrap=True)
        console.print(render_sample(encoded, tokenizer, brackets=not _has_color(console)), soft_wrap=True)
        console.print()
    shown = min(limit, len(records))
    console.print(Text(f"{shown} of {len(records)} records shown, {num_faulty} of them faulty; template {form.name}"))
    return num_faulty


def render_sample(encoded: EncodedConversation, tokenizer: PreTrainedTokenizerBase, *, brackets: bool) -> Text:
    """The sample's text with its supervised stretches marked by colour, or by brackets."""
    rendered = Text()
    for text, kind in _stretches(encoded, tokenizer):
        if kind == "image":
            rendered.append(IMAGE_MARK, style=IMAGE_STYLE)
        elif kind == "supervised":
            text = _printable(text).replace("\n", "↵\n")
            rendered.append(text.join(BRACKETS) if brackets else text, style=SUPERVISED_STYLE)
        else:
            rendered.append(_printable(text))
    return rendered


def _stretches(encoded: EncodedConversation, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """(text, 'image' | 'supervised' | 'context') in order; each text is what its tokens add to those before them."""

    def kind(position: int) -> str:
        if encoded.input_ids[position] == IMAGE_PLACEHOLDER:
            return "image"
        return "context" if encoded.labels[position] == IGNORE_INDEX else "supervised"

    so_far: list[int] = []
    for name, positions in groupby(range(len(encoded.input_ids)), key=kind):
        if name == "image":
            so_far = []
            for _ in positions:
                yield IMAGE_MARK, name
            continue
        before = tokenizer.decode(so_far)
        so_far = so_far + [encoded.input_ids[position] for position in positions]
        yield str(tokenizer.decode(so_far))[len(before) :], name


def _headline(record: Record, encoded: EncodedConversation) -> Text:
    num_supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
    images = f", images: {', '.join(record.images)}" if record.images else ", text only"
    counts = f" · {len(encoded.input_ids)} tokens, {num_supervised} supervised{images}"
    return Text.assemble((f"── {record.name}", "bold"), counts)


def _has_color(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _printable(text: str) -> str:
    """Control characters spelled out: data must not steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
