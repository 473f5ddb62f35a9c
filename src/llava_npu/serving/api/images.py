"""From the images of a request to their bytes."""

from __future__ import annotations

import base64
import binascii

from llava_npu.errors import UserError
from llava_npu.serving.api.fetching import ImageFetcher


async def read_image(url: str, name: str, fetcher: ImageFetcher | None) -> bytes:
    """The bytes of the image that a data URL holds, or that an http(s) URL leads to.

    Args:
        name: of the field, for error messages.
        fetcher: None where this server fetches nothing.

    Raises:
        UserError: not an image's data URL, damaged base64, or a URL that is not fetched.
    """
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        return decode_data_url(url, name)
    if scheme in ("http", "https"):
        if fetcher is None:
            raise UserError(
                f"{name}: this server fetches no images from the web (it does with --allow-image-urls); "
                "send a data URL: data:image/png;base64,…"
            )
        return await fetcher.fetch(url)
    raise UserError(f"{name}: {url[:32]!r} is neither a data URL (data:image/png;base64,…) nor an http(s) URL")


def decode_data_url(url: str, name: str) -> bytes:
    """The bytes in `data:image/…;base64,…`."""
    head, comma, content = url.partition(",")
    kind, *parameters = head[len("data:") :].split(";")
    if not comma or not kind.strip().lower().startswith("image/"):
        raise UserError(f"{name}: a data URL of type {kind[:40]!r}; expected data:image/png;base64,…")
    if "base64" not in (each.strip().lower() for each in parameters):
        raise UserError(f"{name}: the data URL is not in base64; expected data:{kind};base64,…")
    return decode_base64(content, name)


def decode_base64(content: str, name: str) -> bytes:
    """The bytes of base64 text, in lines or not, strictly: what was cut off on its way is refused, not guessed.

    Raises:
        UserError: it is damaged or empty.
    """
    try:
        data = base64.b64decode(content.encode("ascii").translate(None, b"\r\n"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: damaged base64, maybe cut off ({error}); encode the image's file again") from error
    if not data:
        raise UserError(f"{name}: the image is empty (0 bytes)")
    return data
