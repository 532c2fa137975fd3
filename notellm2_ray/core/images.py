"""Safe decoding of images from untrusted sources.

An image's declared size is read before anything is decoded: a PNG of half a megabyte can hold 169 megapixels, which
take 660 MB. Only formats that notes really have are tried, so that a file cannot reach a rarely used decoder.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from typing import TYPE_CHECKING

from notellm2_ray.core.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 20_000_000
# A processor that resizes the shorter side would enlarge a strip of 10 x 1,000,000 to billions of pixels. The longest
# screenshots that people post are some 20 times as long as wide.
MAX_ASPECT = 100
# Every scan of a progressive JPEG goes over the whole picture, so a small file with many scans takes very long to
# decode. Cameras and libraries write some 10.
MAX_SCANS = 100
_JPEG, _SCAN, _END = b"\xff\xd8", 0xDA, 0xD9
# The markers that end an image or begin a segment with a length. Compressed data cannot contain them: in it, 0xff is
# followed by a zero or by a marker without a segment.
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xdd\xe0-\xef\xfe]")

_ORIENTATION_TAG = 0x0112


def check_image(
    data: bytes,
    *,
    max_pixels: int | None = MAX_PIXELS,
    max_bytes: int | None = MAX_BYTES,
    knobs: tuple[str, str] = ("prepare.max_image_pixels", "prepare.max_image_bytes"),
) -> None:
    """Check that an image has a known format and an acceptable declared size, and can be decoded to its end.

    Args:
        data: the encoded image.
        max_pixels: largest declared width x height, read before decoding; None: Pillow's limit of 179 megapixels.
        max_bytes: largest encoded size; None: any.
        knobs: the settings that these two came from, for the message.

    Raises:
        DataError: why the image cannot be used.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise DataError(f"{len(data):,} bytes, more than the {max_bytes:,} allowed ({knobs[1]})")
    # Decoding at an eighth of the size still reads every byte, so it finds a truncated file at a fraction of the cost.
    _decode(data, 1, max_pixels, knobs[0])


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """The first frame of an image, upright (EXIF orientation applied), on white where it is transparent.

    Args:
        data: the encoded image. Its size is checked once, by :func:`check_image`; here only Pillow's limit holds.
        min_side: the size that the caller needs for the shorter side, in pixels. A JPEG is then decoded at 1/2, 1/4 or
            1/8 of its size, as long as both sides stay at least this long, which is about twice as fast.

    Returns:
        an RGB ``PIL.Image``.

    Raises:
        DataError: why the image cannot be used.
    """
    return _decode(data, min_side)


def _decode(data: bytes, min_side: int | None, max_pixels: int | None = None, knob: str = "") -> Image.Image:
    try:
        with _open(data) as image:
            _check_size(image.size, max_pixels, knob)
            _check_scans(data)
            orientation = _orientation(image)
            if min_side is not None:
                image.draft(image.mode, (min_side, min_side))  # acts on JPEG only
            image.load()
            return _upright(_to_rgb(image), orientation)
    except DataError:
        raise
    # Decoders raise all kinds of exceptions for a broken file (OSError, SyntaxError, struct.error, zlib.error...). In
    # any case the image is unusable, and the message says why.
    except Exception as error:
        raise DataError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _open(data: bytes) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError("empty, 0 bytes")
    try:
        with warnings.catch_warnings():  # our own check replaces Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"absurdly large: {error}") from error
    except UnidentifiedImageError:
        raise DataError("not a readable JPEG, PNG, WebP, GIF or BMP image") from None


def _check_size(size: tuple[int, int], max_pixels: int | None, knob: str) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise DataError(
            f"declares {width} x {height} pixels ({width * height / 1e6:,.1f} megapixels), more than the "
            f"{max_pixels / 1e6:,.1f} megapixels allowed ({knob})"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(f"declares {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def _check_scans(data: bytes) -> None:
    """Refuse too many scans. Those inside a segment (a thumbnail) or after the image (a film) do not count."""
    scans, place = 0, len(_JPEG)
    while data.startswith(_JPEG) and (found := _SEGMENT.search(data, place)):
        marker = data[found.start() + 1]
        if marker == _END:
            return
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            raise DataError(f"a JPEG of more than {MAX_SCANS} scans")
        # A length includes its own two bytes; a smaller one is an error that the decoder reports.
        place = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))


def _orientation(image: Image.Image) -> int:
    # Broken metadata does not make a picture unusable: its orientation is then taken as it is stored.
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose

    moves = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    move = moves.get(orientation)
    return image if move is None else image.transpose(move)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips it to white instead of scaling.
        import numpy as np

        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
