"""Safe decoding of images from untrusted sources.

An image's declared size is read before anything is decoded: a PNG of half a megabyte can hold 169 megapixels, which
take 660 MB. This is the one module that opens images: training, bulk work, the service, the reports and the page all
see the pixels that :func:`decode_image` gives.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from typing import TYPE_CHECKING

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.image_colours import to_rgb
from notellm2_ray.core.image_formats import READABLE, pillow_formats

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 50_000_000
MAX_BYTES = 20_000_000
# Of a longer strip only the middle is read. A processor that resizes the shorter side would enlarge 10 x 1,000,000
# pixels to billions, and Qwen2-VL's refuses sides over 200 times the other. The longest screenshots that people post
# are some 20 times as long as wide.
MAX_ASPECT = 100
MIN_SIDE = 28  # of an image for a multimodal LLM: one visual token of Qwen2-VL
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

    Of a strip that is more than :data:`MAX_ASPECT` times as long as wide, only the middle is returned.

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


def scaled_image(data: bytes, max_pixels: int) -> Image.Image:
    """An image for a multimodal LLM: of at most ``max_pixels``, and no side shorter than :data:`MIN_SIDE` pixels.

    A larger image is scaled down in its proportions, and a smaller one up. Of a strip that cannot have both, only the
    middle is shown. Summaries, tuning, scoring and the service all use this rule.

    Args:
        max_pixels: at least MIN_SIDE squared.

    Raises:
        DataError: the image cannot be decoded.
    """
    from PIL import Image

    image = cut_middle(decode_image(data, min_side=math.isqrt(max_pixels)), max_pixels // MIN_SIDE**2)
    width, height = image.size
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    scale = max(scale, MIN_SIDE / min(width, height))
    if scale == 1.0:
        return image
    size = [max(MIN_SIDE, int(side * scale)) for side in (width, height)]
    longest = max_pixels // min(size)  # rounding up the short side must not exceed the area
    return image.resize((min(size[0], longest), min(size[1], longest)), Image.Resampling.BICUBIC)


def _decode(data: bytes, min_side: int | None, max_pixels: int | None = None, knob: str = "") -> Image.Image:
    try:
        with _open(data) as image:
            _check_size(image.size, max_pixels, knob)
            _check_scans(data)
            # Pillow turns TIFF images itself while it loads them.
            orientation = 1 if image.format == "TIFF" else _orientation(image)
            if min_side is not None:
                image.draft(image.mode, (min_side, min_side))  # acts on JPEG only
            image.load()
            return _upright(to_rgb(cut_middle(image, MAX_ASPECT)), orientation)
    except DataError:
        raise
    # Decoders raise all kinds of exceptions for a broken file (OSError, SyntaxError, struct.error, zlib.error...). In
    # any case the image is unusable, and the message says why.
    except Exception as error:
        raise DataError(f"cannot be decoded: {str(error).strip() or type(error).__name__}") from error


def _open(data: bytes) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError("empty, 0 bytes")
    formats = pillow_formats(data)
    try:
        with warnings.catch_warnings():  # our own check replaces Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise DataError(f"absurdly large: {error}") from error
    except UnidentifiedImageError:
        raise DataError(f"not a readable {READABLE} image") from None


def _check_size(size: tuple[int, int], max_pixels: int | None, knob: str) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise DataError(
            f"declares {width} x {height} pixels ({width * height / 1e6:,.1f} megapixels), more than the "
            f"{max_pixels / 1e6:,.1f} megapixels allowed ({knob})"
        )


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


def cut_middle(image: Image.Image, ratio: int) -> Image.Image:
    """The middle of a strip, ``ratio`` times as long as wide; any other picture as it is."""
    width, height = image.size
    longest = ratio * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
