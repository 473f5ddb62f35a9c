from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava_npu.data.images import image_size, load_image, pad_to_square, padding_color
from llava_npu.errors import UserError


def pixel(image: Image.Image, x: int, y: int = 0) -> tuple[int, ...]:
    return tuple(np.asarray(image)[y, x].tolist())


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def two_colors(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue; 4 wide, 2 high."""
    image = Image.new("RGB", (4, 2), "red")
    image.paste("blue", (2, 0, 4, 2))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_lossless_modes_keep_their_colors(mode: str) -> None:
    image = load_image(encoded(two_colors(mode)))
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert (pixel(image, 0, 0), pixel(image, 3, 0)) == ((255, 0, 0), (0, 0, 255))


def test_file_and_bytes_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(two_colors()))
    assert load_image(path).tobytes() == load_image(str(path)).tobytes() == load_image(path.read_bytes()).tobytes()


def test_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    image = load_image(encoded(two_colors(), "JPEG", exif=exif, quality=95, subsampling=0))
    assert image.size == (2, 4)
    red, _, blue = pixel(image, 0, 0)
    assert red > 200 > 50 > blue


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "MPO", "AVIF"])
def test_the_head_tells_the_size_of_the_upright_picture(file_format: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"save_all": True, "append_images": [two_colors()]} if file_format == "MPO" else {}
    try:
        data = encoded(two_colors(), file_format, exif=exif, **options)
    except KeyError:
        pytest.skip(f"this Pillow writes no {file_format}")
    image = load_image(data)
    path = tmp_path / "image"
    path.write_bytes(data)
    assert image_size(data) == image_size(path) == image_size(str(path)) == (image.height, image.width)
    if file_format != "AVIF":  # some of its encoders turn the pixels instead
        assert image.size == ((2, 4) if orientation > 4 else (4, 2))


def test_the_size_of_a_png_that_says_how_it_lies_behind_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    plain = encoded(two_colors())
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\x00\x00")
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = plain[:-12] + late + plain[-12:]
    assert load_image(data).size == (2, 4)
    assert image_size(data) == (4, 2)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_the_size_of_every_mode(mode: str) -> None:
    picture = Image.fromarray(np.zeros((2, 5), dtype="<u2")) if mode == "I;16" else Image.new(mode, (5, 2))
    assert image_size(encoded(picture, "TIFF" if mode == "CMYK" else "PNG")) == (2, 5)


def test_the_size_is_read_without_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Image.Image) -> None:
        raise AssertionError("decoded")

    data = {name: encoded(two_colors(), name) for name in ("PNG", "JPEG", "GIF", "BMP")}
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert {image_size(each) for each in data.values()} == {(2, 4)}


@pytest.mark.parametrize("data", [b"", b"junk"])
def test_no_size_without_a_picture(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UserError, match=r"^rec 4: image .*a.png: "):
        image_size(tmp_path / "a.png", "rec 4")
    with pytest.raises(UserError, match=r"^rec 4: image .*b.png: cannot be read: No such file"):
        image_size(tmp_path / "b.png", "rec 4")
    with pytest.raises(UserError, match="more than 89,478,485 pixels"):
        image_size(png_claiming(10_000, 10_000))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    black = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    black.putpixel((1, 0), (0, 0, 0, 255))
    image = load_image(encoded(black.convert(mode)))
    assert [pixel(image, x, 0) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


def test_palette_with_a_transparent_color() -> None:
    image = two_colors("P")
    data = encoded(image, transparency=image.getpixel((0, 0)))
    assert [pixel(load_image(data), x, 0) for x in (0, 3)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize(("file_format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", "<i4")])
def test_sixteen_bits_are_scaled_not_clipped(file_format: str, dtype: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=dtype)
    image = load_image(encoded(Image.fromarray(values), file_format))
    assert [pixel(image, x, 0)[0] for x in range(4)] == [0, 1, 128, 255]


def test_cmyk() -> None:
    image = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = pixel(image, 4, 4)
    assert red > 200 > 60 > max(green, blue)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    image = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixel(image, 0, 0) == (255, 0, 0)


def png_claiming(width: int, height: int) -> bytes:
    """The header of an image that would unpack to width × height pixels, in 60 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 13_000, 60_000])
def test_bombs(side: int, recwarn: pytest.WarningsRecorder) -> None:
    """Between Pillow's warning and its error, and beyond both."""
    with pytest.raises(UserError, match=r"rec 4: image of .* bytes: more than 89,478,485 pixels"):
        load_image(png_claiming(side, side), "rec 4")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image in a supported format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image in a supported format"),
        (encoded(two_colors())[:60], "damaged"),
        (encoded(two_colors(), "JPEG")[:-40], "damaged"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.array([[70_000]], dtype=np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_damaged(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^rec 4: image {path}: .*{message}"):
        load_image(path, "rec 4")


def test_cut_off_whatever_another_library_asks_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval does
    noise = Image.effect_noise((99, 99), 50)
    for file_format in ("PNG", "JPEG"):
        with pytest.raises(UserError, match="damaged"):
            load_image(encoded(noise, file_format)[:-999])


@pytest.mark.parametrize("name", ["missing.jpg", "."])
def test_unreadable(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rec 4: image .*: cannot be read"):
        load_image(tmp_path / name, "rec 4")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "TGA", "ICO"])
def test_no_damage_escapes_as_another_error(file_format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8))
    whole, rng = encoded(noise, file_format), random.Random(0)
    refused = 0
    for attempt in range(100):
        data = bytearray(whole[: rng.randrange(1, len(whole))] if attempt % 2 else whole)
        for _ in range(rng.randrange(5)):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except UserError:
            refused += 1
    assert refused


@pytest.mark.parametrize(("size", "offset"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((4, 4), (0, 0)), ((1, 2), (0, 0))])
def test_pad_to_square(size: tuple[int, int], offset: tuple[int, int]) -> None:
    """LLaVA's expand2square: the offset is rounded down."""
    square = np.asarray(pad_to_square(Image.new("RGB", size, "red"), (1, 2, 3)))
    side = max(size)
    expected = np.full((side, side, 3), (1, 2, 3), dtype=np.uint8)
    expected[offset[1] : offset[1] + size[1], offset[0] : offset[0] + size[0]] = (255, 0, 0)
    assert np.array_equal(square, expected)


def test_padding_color_of_clip_and_siglip() -> None:
    assert padding_color([0.48145466, 0.4578275, 0.40821073]) == (122, 116, 104)
    assert padding_color([0.5, 0.5, 0.5]) == (127, 127, 127)


_XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def _png_with(chunk: str, behind_pixels: bool) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(stored, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    text = f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode("latin-1")
    kind, content = {
        "eXIf": (b"eXIf", raw.removeprefix(b"Exif\0\0")),
        "EXIF as text": (b"tEXt", b"Raw profile type exif\0" + text),
        "EXIF as packed text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP.encode()),
        "large text": (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (2 << 20))),
        "no EXIF": (b"eXIf", b"not a TIFF file"),
        "no EXIF as text": (b"tEXt", b"Raw profile type exif\0\nexif\n8\nnot hexadecimal"),
    }[chunk]
    added = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    place = len(stored.getvalue()) - 12 if behind_pixels else 33
    return stored.getvalue()[:place] + added + stored.getvalue()[place:]


@pytest.mark.parametrize("behind_pixels", [False, True])
@pytest.mark.parametrize(
    "chunk", ["eXIf", "EXIF as text", "EXIF as packed text", "XMP", "large text", "no EXIF", "no EXIF as text"]
)
def test_a_png_has_the_size_that_it_is_loaded_with(chunk: str, behind_pixels: bool) -> None:
    data = _png_with(chunk, behind_pixels)
    image = load_image(data)
    assert image_size(data) == (image.height, image.width)
    assert image.size == ((40, 20) if chunk.startswith(("large", "no")) else (20, 40))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "value", [b"\2\0\2\0\0\x006\0\0\0", b"\5\0\1\0\0\0\x1a\0\0\0\6\0\0\0\0\0\0\0"], ids=["text", "6/0"]
)
def test_an_orientation_that_is_no_number_says_nothing(value: bytes) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1" + value + bytes(8)
    data = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert load_image(data).size == (40, 20)
    assert image_size(data) == (20, 40)


@pytest.mark.parametrize(
    "tail",
    [
        bytes(12),
        b"\0\0\0\0IENE\xaeB`\x82",
        b"\0\0\0\0\xffEND\xaeB`\x82",
        b"\0\0\0\x02tEXta\0\1\2\3\4\0\0\0\0IEND\xaeB`\x82",
        b"",
    ],
    ids=["zeros", "another chunk", "no chunk", "a wrong checksum", "nothing"],
)
def test_a_png_that_is_damaged_behind_its_pixels_has_a_size_if_it_opens(tail: bytes) -> None:
    data = _png_with("eXIf", behind_pixels=False)[:-12] + tail
    assert load_image(data).size == (20, 40)
    assert image_size(data) == (40, 20)


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "WEBP"])
def test_an_orientation_in_xmp_is_known_from_the_head(format: str) -> None:
    stored = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(stored, format, xmp=_XMP.encode())
    image = load_image(stored.getvalue())
    assert image_size(stored.getvalue()) == (image.height, image.width)
