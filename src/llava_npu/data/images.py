"""Opening pictures: whatever a data set holds becomes an upright 8-bit RGB image, or one clear error.

What is done, and why:

- EXIF orientation is applied: cameras store pictures lying and say how to turn them.
- Transparency is laid on white, what such pictures were drawn for; merely dropping the alpha channel (LLaVA) shows
  colours that nobody was meant to see. Palettes are resolved first.
- 16-bit greyscale is scaled to 8 bits. Pillow's own conversion clips it: almost all of the picture turns white.
- CMYK, YCbCr, 1-bit and grey become RGB; animations and multi-page files give their first frame.
- Only raster formats are opened (no EPS: Pillow hands it to Ghostscript, a program interpreter), and only up to
  `MAX_PIXELS`: a few kilobytes can unpack to gigabytes.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from llava_npu.data.image_roots import ImagePath
from llava_npu.errors import UserError

FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # what Pillow warns at: 256 MiB of RGB
# What Pillow's decoders raise on damaged files, beside OSError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
)


def load_image(source: str | ImagePath | bytes, origin: str = "image", *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens a file, a member of an archive, or the bytes of one, as an upright RGB image.

    Args:
        origin: the record it belongs to, the opening of error messages.
        max_pixels: larger pictures are refused before they are unpacked.

    Raises:
        UserError: missing, empty, damaged, of no supported format, or of more than `max_pixels` pixels.
    """
    what = _name(source, origin)
    with _as_user_errors(what, max_pixels):
        picture = _open(io.BytesIO(_bytes(source, what)), max_pixels)
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        return _to_rgb(upright)


def image_size(source: str | ImagePath | bytes, origin: str = "image") -> tuple[int, int]:
    """(height, width) of the picture that `load_image` gives, from the file's head: no pixel is decoded.

    Raises:
        UserError: as `load_image`, as far as the head shows it.
    """
    what = _name(source, origin)
    with _as_user_errors(what, MAX_PIXELS), _file(source, what) as file, _open(file, MAX_PIXELS) as picture:
        width, height = picture.size
        # A TIFF's size is upright already.
        lies = picture.format != "TIFF" and _orientation(picture, file) in _LYING
    return (width, height) if lies else (height, width)


_LYING = (5, 6, 7, 8)  # EXIF orientations with width and height exchanged
_ORIENTATION = 0x0112


def _orientation(picture: Image.Image, file: IO[bytes]) -> int:
    if picture.format == "PNG" and not {"exif", "Raw profile type exif"} & picture.info.keys():
        # Pillow would decode the pixels to look behind them.
        picture.info["exif"] = _exif_behind_pixels(file)
    return int(picture.getexif().get(_ORIENTATION, 1))


def _exif_behind_pixels(file: IO[bytes]) -> bytes:
    """The eXIf chunk of a PNG wherever it stands, found by walking from chunk to chunk."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return b"Exif\x00\x00" + file.read(length)
        file.seek(length + 4, io.SEEK_CUR)
    return b""


def _open(file: IO[bytes], max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused just below
        picture = Image.open(file, formats=[f for f in FORMATS if f in _known_formats()])
    width, height = picture.size
    if width * height > max_pixels:
        raise Image.DecompressionBombError(f"{width}×{height} pixels")
    return picture


@contextmanager
def _as_user_errors(what: str, max_pixels: int) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{what}: not a picture in a supported format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{what}: more than {max_pixels:,} pixels ({error}); scale it down") from error
    except _DECODER_ERRORS as error:
        raise UserError(f"{what}: damaged or unsupported: {error}; copy or convert it again") from error


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centres the image on a square of its longer side, as LLaVA does; an odd pixel goes to the right or bottom."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def padding_color(image_mean: Sequence[float]) -> tuple[int, int, int]:
    """The colour that an image processor's normalisation turns to about zero: int(255·mean) per channel."""
    red, green, blue = (int(255 * value) for value in image_mean)
    return red, green, blue


def _name(source: str | ImagePath | bytes, origin: str) -> str:
    return f"{origin}: image of {len(source)} bytes" if isinstance(source, bytes) else f"{origin}: image {source}"


def _file(source: str | ImagePath | bytes, what: str) -> IO[bytes]:
    """The source to read from; of a file on disk no more is read than is asked for."""
    path = Path(source) if isinstance(source, str) else source
    if not isinstance(path, Path):
        return io.BytesIO(_bytes(path, what))
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(what, error) from error


def _bytes(source: str | ImagePath | bytes, what: str) -> bytes:
    data = source if isinstance(source, bytes) else _read(Path(source) if isinstance(source, str) else source, what)
    if not data:
        raise UserError(f"{what}: the file is empty; copy or download it again")
    return data


def _read(path: ImagePath, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str, error: OSError) -> UserError:
    return UserError(f"{what}: cannot be read: {error.strerror or error}; check the path and image_root")


def _known_formats() -> set[str]:
    """The formats of this build of Pillow: AVIF and JPEG 2000 are optional in it."""
    Image.init()
    return set(Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range, convert the file to 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # (height, width)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels beyond the 16-bit range, convert the file to 8 or 16 bits per channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
