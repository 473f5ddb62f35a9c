"""Samples as a web page: every token in its colour, its id on hovering, the images next to them.

The page is one file without scripts; images are inside it, scaled down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_npu.data.conversation.labels import IGNORE_INDEX, IMAGE_PLACEHOLDER, EncodedConversation
from llava_npu.data.images import load_image
from llava_npu.data.tools.inspected_sample import InspectedSample, headline
from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.pages import data_url, render_page
from llava_npu.files.untrusted import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THUMBNAIL = (320, 320)
_WINDOW = 8  # stretches of context that decide how the next tokens are written
_UNFINISHED = "\ufffd"


def write_page(
    path: Path, samples: Sequence[InspectedSample], tokenizer: PreTrainedTokenizerBase, *, title: str, summary: str
) -> None:
    """Writes the page, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    sections = [_section(sample, tokenizer) for sample in samples]
    write_text(
        path, render_page(Path(__file__).parent, "inspect.html", title=title, summary=summary, sections=sections)
    )


def _section(sample: InspectedSample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    images = range(len(sample.record.images)) if sample.record else ()
    stretches = tokens(sample.encoded, tokenizer) if sample.encoded is not None else ()
    return {
        "title": sample.title,
        "headline": headline(sample),
        "problems": sample.problems,
        "images": [_image(sample, number) for number in images],
        "tokens": [_token(*each) for each in stretches],
    }


def _image(sample: InspectedSample, number: int) -> dict[str, str]:
    assert sample.record is not None
    name = str(sample.record.images[number])
    try:
        return {"name": name, "url": data_url(load_image(sample.record.image_paths[number], sample.title), THUMBNAIL)}
    except UserError as error:
        return {"name": name, "problem": str(error)}


def _token(text: str, ids: Sequence[int], kind: str) -> dict[str, str]:
    about = f"{'image' if kind == 'image' else 'token'} {' '.join(map(str, ids))}"
    return {"text": printable(text).replace("\n", "↵\n"), "about": about, "kind": kind}


def tokens(
    encoded: EncodedConversation, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(text, ids, 'image' | 'learned' | 'context') in order.

    A token's text is what it adds to those before it; tokens that only together make a character stand together.
    """
    before: deque[tuple[int, ...]] = deque(maxlen=_WINDOW)  # whole characters: cut within one, bytes say nothing
    pending: list[int] = []

    def added() -> str:
        context = [token for ids in before for token in ids]
        return str(tokenizer.decode(context + pending))[len(tokenizer.decode(context)) :]

    kind = "context"
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        new_kind = "image" if token == IMAGE_PLACEHOLDER else "context" if label == IGNORE_INDEX else "learned"
        if pending and new_kind != kind:
            yield added(), tuple(pending), kind
            before.append(tuple(pending))
            pending = []
        kind = new_kind
        if kind == "image":
            yield "⟨image⟩", (token,), kind
            before.clear()
            continue
        pending.append(token)
        if not (text := added()).endswith(_UNFINISHED):
            yield text, tuple(pending), kind
            before.append(tuple(pending))
            pending = []
    if pending:
        yield added(), tuple(pending), kind
