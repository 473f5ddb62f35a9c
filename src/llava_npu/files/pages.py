"""Web pages of one file that load nothing, in a common frame: dark or light as the reader's system is, fit for phones.

A page is a jinja2 template next to the code that fills it. It extends `frame.html`, whose blocks are `meta`, `style`
and `body`, and uses the frame's colors (`var(--ink)`, `--paper`, `--card`, `--tint`, `--line`, `--faint`, `--accent`,
`--right`, `--wrong`, `--partly`).
"""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

_FRAME_FOLDER = Path(__file__).parent


def render_page(folder: Path, template: str, *, title: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        folder: holds the template.
        template: its file name.
        title: of the page.
        values: what the template names; everything but `Markup` is escaped.
    """
    return _environment(folder).get_template(template).render(title=title, **values)


def data_url(image: Image.Image, size: tuple[int, int], quality: int = 80) -> str:
    """An image as a JPEG within a page, scaled down in place to fit `size` (width, height)."""
    image.thumbnail(size)
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}"


@cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, _FRAME_FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
