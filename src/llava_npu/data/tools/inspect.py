"""Shows samples as the model will see them, with the supervised tokens marked: the check before a long run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from llava_npu.data.conversation.labels import IGNORE_INDEX, IMAGE_PLACEHOLDER, EncodedConversation
from llava_npu.data.conversation.templates import get_template
from llava_npu.data.conversation.turns import IMAGE_MARK
from llava_npu.data.records import open_records
from llava_npu.data.tools.inspect_html import write_page
from llava_npu.data.tools.inspected_sample import InspectedSample, headline, inspect_sample
from llava_npu.errors import UserError
from llava_npu.files.console import SafeConsole
from llava_npu.files.untrusted import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPERVISED_STYLE = "bold green"
IMAGE_STYLE = "bold magenta"
BRACKETS = ("⟦", "⟧")  # without colour


@dataclass(frozen=True)
class InspectOptions:
    """What to show.

    Args:
        template: the conversation template.
        image_root, allow_absolute_paths: as for `open_records`.
        start, limit: the first record, and how many.
        html: also write them to this page, token by token, with the images.
    """

    template: str = "v1"
    image_root: str | Path | None = None
    allow_absolute_paths: bool = False
    start: int = 0
    limit: int = 5
    html: Path | None = None


def inspect_records(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    options: InspectOptions = InspectOptions(),
    console: Console | None = None,
) -> int:
    """Prints records; supervised text is green, or in ⟦ ⟧ where the output has no colour.

    A record that cannot be read or encoded is shown with its error, and the others follow.

    Returns:
        The number of shown records that cannot be trained on: wrong text, or a missing or damaged image.

    Raises:
        UserError: the file cannot be read, the template is unknown, or the page cannot be written.
    """
    console = console or SafeConsole(highlight=False)
    form = get_template(options.template)
    records = open_records(path, options.image_root, allow_absolute_paths=options.allow_absolute_paths)
    if options.start >= len(records):
        raise UserError(f"{path}: record {options.start} does not exist; the last one is {len(records) - 1}")
    numbers = range(options.start, min(options.start + options.limit, len(records)))
    samples = [inspect_sample(records, number, tokenizer, form) for number in numbers]
    for sample in samples:
        _print(sample, tokenizer, console)
    num_faulty = sum(bool(sample.problems) for sample in samples)
    summary = f"{len(samples)} of {len(records)} records shown, {num_faulty} of them faulty; template {form.name}"
    console.print(Text(summary))
    if options.html is not None:
        write_page(options.html, samples, tokenizer, title=Path(path).name, summary=summary)
        console.print(Text(f"page: {options.html}"))
    return num_faulty


def _print(sample: InspectedSample, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    counts = headline(sample)
    console.print(
        Text.assemble((f"── {printable(sample.title)}", "bold"), printable(f" · {counts}" if counts else "")),
        soft_wrap=True,
    )
    for problem in sample.problems:
        console.print(Text(printable(problem), style="red"), soft_wrap=True)
    if sample.encoded is not None:
        console.print(render_sample(sample.encoded, tokenizer, brackets=not _has_color(console)), soft_wrap=True)
    console.print()


def render_sample(encoded: EncodedConversation, tokenizer: PreTrainedTokenizerBase, *, brackets: bool) -> Text:
    """The sample's text with its supervised stretches marked by colour, or by brackets."""
    rendered = Text()
    for text, kind in _stretches(encoded, tokenizer):
        if kind == "image":
            rendered.append(IMAGE_MARK, style=IMAGE_STYLE)
        elif kind == "supervised":
            text = printable(text).replace("\n", "↵\n")
            rendered.append(text.join(BRACKETS) if brackets else text, style=SUPERVISED_STYLE)
        else:
            rendered.append(printable(text))
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


def _has_color(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color
