"""Samples as a web page: every token in its colour, its id on hovering, the images next to them.

The page is one file without scripts; images are inside it, scaled down.
"""

from __future__ import annotations

import base64
import io
from collections import deque
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llava_npu.data.conversation.labels import IGNORE_INDEX, IMAGE_PLACEHOLDER, EncodedConversation
from llava_npu.data.images import load_image
from llava_npu.data.tools.inspected_sample import InspectedSample, headline, printable
from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THUMBNAIL = (320, 320)
_WINDOW = 8  # stretches of context that decide how the next tokens are written
_UNFINISHED = "\ufffd"

_STYLE = """
:root { color-scheme: light dark; --learned: #1a7f37; --learned-back: #1a7f3722; --image: #8250df; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --learned: #3fb950; --learned-back: #3fb95033; --image: #a371f7;
  --bad: #f85149 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1rem; margin: 2rem 0 .2rem; overflow-wrap: anywhere } .counts { opacity: .7; overflow-wrap: anywhere }
pre { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
pre span { border-radius: 2px } pre span:hover { outline: 1px solid }
.learned { color: var(--learned); background: var(--learned-back); font-weight: 600 }
.image { color: var(--image); font-weight: 600 } .bad { color: var(--bad); overflow-wrap: anywhere }
img { max-height: 10rem; margin: .3rem .5rem .3rem 0; border-radius: 4px }
"""


def write_page(
    path: Path, samples: Sequence[InspectedSample], tokenizer: PreTrainedTokenizerBase, *, title: str, summary: str
) -> None:
    """Writes the page, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_text(path, render_page(samples, tokenizer, title=title, summary=summary))


def render_page(
    samples: Sequence[InspectedSample], tokenizer: PreTrainedTokenizerBase, *, title: str, summary: str
) -> str:
    """The page as HTML."""
    body = "\n".join(_section(sample, tokenizer) for sample in samples)
    legend = (
        '<span class="learned">learned from</span> · context · <span class="image">⟨image⟩</span> stands for an '
        "image's tokens · ↵ is a newline"
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>\n<p>{legend}</p>\n{body}\n</html>\n"
    )


def _section(sample: InspectedSample, tokenizer: PreTrainedTokenizerBase) -> str:
    lines = [f"<section><h2>{escape(sample.title)}</h2>", f'<p class="counts">{escape(headline(sample))}</p>']
    lines += [f'<p class="bad">{escape(problem)}</p>' for problem in sample.problems]
    lines += [_image(sample, number) for number in range(len(sample.record.images) if sample.record else 0)]
    if sample.encoded is not None:
        lines.append(f"<pre>{''.join(_span(*token) for token in tokens(sample.encoded, tokenizer))}</pre>")
    return "\n".join([*lines, "</section>"])


def _image(sample: InspectedSample, number: int) -> str:
    assert sample.record is not None
    name = escape(str(sample.record.images[number]), quote=True)
    try:
        image = load_image(sample.record.image_paths[number], sample.title)
    except UserError as error:
        return f'<p class="bad">{escape(str(error))}</p>'
    image.thumbnail(THUMBNAIL)
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}"
    return f'<img src="{source}" alt="{name}" title="{name}">'


def _span(text: str, ids: Sequence[int], kind: str) -> str:
    shown = escape(printable(text)).replace("\n", "↵\n")
    title = f"{'image' if kind == 'image' else 'token'} {' '.join(map(str, ids))}"
    return f'<span class="{kind}" title="{title}">{shown}</span>'


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
