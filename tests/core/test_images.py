"""Images from untrusted sources: which are refused, why, and how the others are decoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.images import check_image, decode_image


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png_declaring(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_accepts_the_formats_that_notes_have(format_):
    data = encoded(picture(), format_)
    check_image(data)
    image = decode_image(data)
    assert (image.mode, image.size) == ("RGB", (64, 48))


def test_refuses_other_formats():
    with pytest.raises(DataError, match="not a readable JPEG, PNG, WebP, GIF, BMP, AVIF or TIFF"):
        check_image(encoded(picture(), "PPM"))
    with pytest.raises(DataError, match="not a readable"):
        check_image(b"<html>404 Not Found</html>")
    with pytest.raises(DataError, match="empty, 0 bytes"):
        check_image(b"")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_finds_truncation(format_):
    data = encoded(picture(200, 200), format_)
    for keep in (0.3, 0.6, 0.9):
        with pytest.raises(DataError):
            check_image(data[: int(len(data) * keep)])


@pytest.mark.parametrize("size", [(13_000, 13_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_declared_size(size):
    # A decoded 13,000 x 13,000 PNG takes 500 MB; this one holds no such data, so decoding would say "truncated".
    with pytest.raises(DataError, match=r"13000 x 13000 pixels \(169.0 megapixels\)|absurdly large"):
        check_image(png_declaring(*size))


def test_callers_choose_the_bounds():
    data = encoded(picture(), "PNG")
    with pytest.raises(DataError, match=r"64 x 48 pixels .*prepare.max_image_pixels"):
        check_image(data, max_pixels=3071)
    check_image(data, max_pixels=3072)
    with pytest.raises(DataError, match=r"more than the 10 allowed \(prepare.max_image_bytes\)"):
        check_image(data, max_bytes=10)
    with pytest.raises(DataError, match=r"\(limits\.pixels\)"):
        check_image(data, max_pixels=3071, knobs=("limits.pixels", "limits.bytes"))
    with pytest.raises(DataError, match=r"\(limits\.bytes\)"):
        check_image(data, max_bytes=10, knobs=("limits.pixels", "limits.bytes"))


def test_an_image_that_a_raised_bound_allows_can_be_decoded():
    data = encoded(Image.new("1", (8000, 6300)), "PNG")
    with pytest.raises(DataError, match="prepare.max_image_pixels"):
        check_image(data)
    check_image(data, max_pixels=60_000_000)
    check_image(data, max_pixels=None, max_bytes=None)
    assert decode_image(data).size == (8000, 6300)
    with pytest.raises(DataError, match="absurdly large"):  # Pillow's own bound
        decode_image(png_declaring(60_000, 60_000))


def test_draft_keeps_the_short_side_and_the_picture():
    large = picture(40, 30).resize((800, 600), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=95)
    image = decode_image(data, min_side=100)
    assert image.size == (200, 150)
    plain = decode_image(data).resize(image.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image, int) - np.asarray(plain, int)).mean() < 4
    assert decode_image(data, min_side=600).size == (800, 600)


def test_orientation_is_applied():
    image = Image.new("RGB", (60, 40), "black")
    image.paste((255, 0, 0), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned clockwise
    turned = decode_image(encoded(image, "JPEG", exif=exif, quality=95), min_side=8)
    assert turned.width < turned.height
    assert turned.getpixel((turned.width // 2, 1))[0] > 200
    assert turned.getpixel((turned.width // 2, turned.height - 2))[0] < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_picture_with_broken_metadata_is_kept():
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*garbage garbage garbage")
    check_image(data)
    assert decode_image(data).size == (64, 48)


def test_a_jpeg_of_very_many_scans_is_refused_and_a_progressive_one_is_not():
    data = encoded(picture(), "JPEG", progressive=True)
    check_image(data)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    with pytest.raises(DataError, match="more than 100 scans"):
        check_image(data[:start] + scan * 200 + data[-2:])


def test_only_scans_of_the_image_itself_count():
    data = encoded(picture(), "JPEG")
    scans = b"\xff\xda\x00\x08" * 200
    check_image(data + scans)  # a motion photo's film
    check_image(data[:2] + b"\xff\xfe" + struct.pack(">H", len(scans) + 2) + scans + data[2:])  # a segment's contents


@pytest.mark.parametrize(
    "filler", [b"\xff", b"\xff\xda\x00\x00", b"\xff\x02\xff\xff", b"\xff\xe0\x00\x00", b"\xff\xda"]
)
def test_malformed_segments_are_refused(filler):
    data = encoded(picture(), "JPEG")
    start = data.rindex(b"\xff\xda")
    with pytest.raises(DataError):
        check_image(data[:start] + filler * 100_000)


def test_scans_cannot_hide_behind_a_marker_that_the_decoder_skips():
    data = encoded(picture(), "JPEG", progressive=True, restart_marker_blocks=1)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    with pytest.raises(DataError, match="more than 100 scans"):
        check_image(data[:start] + (scan + b"\xff\x02\xff\xff") * 200 + data[-2:])
