"""Opening images: whatever a data set holds becomes an upright 8-bit RGB image, or one clear error.

What is done, and why:

- EXIF orientation is applied: cameras store images lying and say how to turn them. EXIF data that cannot be read says
  nothing: the pixels next to it are whole.
- Transparency is laid on white, what such images were drawn for; merely dropping the alpha channel (LLaVA) shows
  colours that nobody was meant to see. Palettes are resolved first.
- 16-bit greyscale is scaled to 8 bits. Pillow's own conversion clips it: almost all of the image turns white.
- CMYK, YCbCr, 1-bit and grey become RGB; animations and multi-page files give their first frame.
- Only raster formats are opened (no EPS: Pillow hands it to Ghostscript, a program interpreter), and only up to
  `MAX_PIXELS`: a few kilobytes can unpack to gigabytes.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from llava_npu.data.image_roots import ImagePath
from llava_npu.errors import UserError

FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # what Pillow warns at: 256 MiB of RGB
_PADDED_PIXELS = 4096 * 4096  # the largest square that is padded, or image that is scaled up, as a whole
_ROWS_AT_ONCE = 4096
_LONGEST_SIDE = 65_536  # in padding; above, no side of a thin image is as wide as a pixel that a model sees
# What one image's metadata may unpack to; by default Pillow refuses images with more than 1 MiB of text.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# What Pillow's decoders raise on damaged files, besides OSError.
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
        max_pixels: larger images are refused before they are unpacked.

    Raises:
        UserError: missing, empty, damaged, of no supported format, or of more than `max_pixels` pixels.
    """
    what = _name(source, origin)
    with _as_user_errors(what, max_pixels):
        image = _open(io.BytesIO(_bytes(source, what)), max_pixels)
        image.load()
        turn = _TURNS.get(_exif_orientation(image.getexif))
        return _to_rgb(image if turn is None else image.transpose(turn))


def image_size(source: str | ImagePath | bytes, origin: str = "image") -> tuple[int, int]:
    """(height, width) of the image that `load_image` gives, from the file's head: no pixel is decoded.

    Raises:
        UserError: as `load_image`, as far as the head shows it.
    """
    what = _name(source, origin)
    with _as_user_errors(what, MAX_PIXELS), _file(source, what) as file, _open(file, MAX_PIXELS) as image:
        width, height = image.size
        lies = _orientation(image, file) in _LYING
    return (width, height) if lies else (height, width)


_TURNS: dict[Any, Image.Transpose] = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # width and height exchanged
_ORIENTATION = 0x0112


def _exif_orientation(read_exif: Callable[[], Image.Exif]) -> Any:
    """A number of 1 to 8, or whatever else the file holds there; 1 if it cannot be read."""
    try:
        return read_exif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1


def _orientation(image: Image.Image, file: IO[bytes]) -> Any:
    """How `load_image` will turn the decoded image."""
    if image.format == "TIFF" and _ORIENTATION in image.getexif():
        return 1  # Pillow turns it while decoding, and its size is upright already
    if image.format == "PNG":
        # Pillow would decode the pixels to look behind them.
        with Image.open(io.BytesIO(_without_pixels(file)), formats=["PNG"]) as head:
            return _exif_orientation(partial(Image.Image.getexif, head))
    return _exif_orientation(image.getexif)


def _without_pixels(file: IO[bytes]) -> bytes:
    """A PNG's chunks but those of pixels, wherever they stand, before an empty one of these.

    Behind the pixels Pillow stops reading at whatever is not a chunk, and does not compare checksums.
    """
    file.seek(0)
    kept = [file.read(8)]
    behind_pixels = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND" or (behind_pixels and not re.fullmatch(rb"\w{4}", kind)):
            break
        if kind in (b"IDAT", b"fdAT"):
            behind_pixels = True
            file.seek(length + 4, io.SEEK_CUR)
        else:
            content, checksum = file.read(length), file.read(4)
            kept += [head, content, struct.pack(">I", zlib.crc32(kind + content)) if behind_pixels else checksum]
    return b"".join([*kept, struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))])


def _open(file: IO[bytes], max_pixels: int) -> Image.Image:
    # Other libraries (lmms-eval) have Pillow fill what a damaged file lacks with grey, for their whole process.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused just below
        image = Image.open(file, formats=[f for f in FORMATS if f in _known_formats()])
    width, height = image.size
    if width * height > max_pixels:
        raise Image.DecompressionBombError(f"{width}×{height} pixels")
    return image


@contextmanager
def _as_user_errors(what: str, max_pixels: int) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{what}: not an image in a supported format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{what}: more than {max_pixels:,} pixels ({error}); scale it down") from error
    except _DECODER_ERRORS as error:
        raise UserError(f"{what}: damaged or unsupported: {error}; copy or convert it again") from error


def pad_to_square(
    image: Image.Image,
    color: tuple[int, int, int],
    target: tuple[int, int] | None = None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Centres the image on a square of its longer side, as LLaVA does; an odd pixel goes to the right or bottom.

    A square of many pixels, which a long thin image has, is never made where `target` is known: the longer side is
    scaled before the image is padded. That differs from LLaVA's padding and scaling by at most one of 255 levels.

    Args:
        target: (height, width) to which the square will be scaled, if it will.
        resample: how.
    """
    side = max(image.size)
    if image.width == image.height:
        return image
    if target is None or side * side <= _PADDED_PIXELS:
        return _centred(image, (side, side), color)
    if side > _LONGEST_SIDE:
        sides = [max(1, round(length * _LONGEST_SIDE / side)) for length in image.size]
        image, side = image.resize((sides[0], sides[1]), Image.Resampling.BOX), _LONGEST_SIDE
    height, width = target
    if image.width > image.height:
        strip = _centred(image.resize((width, image.height), resample), (width, side), color)
    else:
        strip = _padded_rows(image, color, width, resample)
    return strip.resize((width, height), resample)


def _padded_rows(
    image: Image.Image, color: tuple[int, int, int], width: int, resample: Image.Resampling
) -> Image.Image:
    """Each row of a tall image padded to the image's height and scaled to `width`, as Pillow would do first.

    That is a matrix, which Pillow itself gives by scaling an identity: the padded rows need not exist.
    """
    offset = (image.height - image.width) // 2
    padded = np.zeros((image.width, image.height), dtype=np.float32)
    padded[np.arange(image.width), offset + np.arange(image.width)] = 1
    weights = np.asarray(Image.fromarray(padded).resize((width, image.width), resample))  # (columns, width)
    touched = weights.any(axis=0)
    weights = weights[:, touched]  # (columns, touched)
    background = np.outer(color, 1 - weights.sum(axis=0)).astype(np.float32)  # (channels, touched)
    rows = np.empty((image.height, width, 3), dtype=np.uint8)
    rows[:] = color
    for start in range(0, image.height, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, image.height)
        band = np.asarray(image.crop((0, start, image.width, stop)), dtype=np.float32)  # (rows, columns, channels)
        scaled = band.transpose(0, 2, 1).reshape(-1, image.width) @ weights
        scaled = scaled.reshape(stop - start, 3, -1) + background
        rows[start:stop, touched] = scaled.round().clip(0, 255).transpose(0, 2, 1)
    return Image.fromarray(rows)


def _centred(image: Image.Image, size: tuple[int, int], color: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new(image.mode, size, color)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def centre_of(image: Image.Image, edge: int, crop: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """What a processor sees that scales the shorter side to `edge` and crops (height, width) from the centre.

    Of a long thin image no more is scaled than that; the pixels are those of scaling it all.
    """
    shorter, longer = sorted(image.size)
    scaled = int(edge * longer / shorter)
    if scaled * edge <= _PADDED_PIXELS:
        return image
    is_wide = image.width > image.height
    of_crop = crop[1] if is_wide else crop[0]
    first = (scaled - of_crop) // 2 - (edge - of_crop) // 2
    start, end = (place * longer / scaled for place in (first, first + edge))
    box = (start, 0, end, shorter) if is_wide else (0, start, shorter, end)
    return image.resize((edge, edge), resample, box)


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
