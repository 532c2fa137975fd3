"""Images from strangers, decoded safely.

An image's declared size is read before anything is decoded: a PNG of half a megabyte can hold 169 megapixels, which
take 660 MB. Only formats that notes really have are tried, so that an odd file cannot reach an odd decoder.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import TYPE_CHECKING

from notellm2_ray.core.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 20_000_000
# A processor that resizes the shorter side blows a 10 x 1,000,000 strip up to billions of pixels; the longest
# screenshots that people post are some 20 times as long as wide.
MAX_ASPECT = 100
# Every scan of a progressive JPEG goes over the whole picture again, so a small file of very many scans takes very
# long. Cameras and libraries write some 10.
MAX_SCANS = 100
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"

_ORIENTATION_TAG = 0x0112


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> None:
    """Check that an image is of a known format, of a sane declared size, and decodes to its end.

    Args:
        data: the encoded image.
        max_pixels: the largest declared width x height; read before decoding.
        max_bytes: the largest encoded size.

    Raises:
        DataError: with the reason.
    """
    if len(data) > max_bytes:
        raise DataError(f"{len(data):,} bytes, more than the {max_bytes:,} allowed (prepare.max_image_bytes)")
    # Decoding at an eighth still reads every byte, so it finds truncation at a fraction of the cost.
    _decode(data, 1, max_pixels)


def decode_image(data: bytes, min_side: int | None = None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an image, upright (EXIF orientation applied), on white where it is transparent.

    Args:
        data: the encoded image.
        min_side: the caller's own target for the shorter side, in pixels. A JPEG is then decoded at 1/2, 1/4 or 1/8
            of its size as far as both sides stay at least this long, which is about twice as fast.
        max_pixels: the largest declared width x height; read before decoding.

    Returns:
        an RGB ``PIL.Image``.

    Raises:
        DataError: with the reason.
    """
    return _decode(data, min_side, max_pixels)


def _decode(data: bytes, min_side: int | None, max_pixels: int) -> Image.Image:
    try:
        with _open(data) as image:
            _check_size(image.size, max_pixels)
            _check_scans(data)
            orientation = _orientation(image)
            if min_side is not None:
                image.draft(image.mode, (min_side, min_side))  # acts on JPEG only
            image.load()
            return _upright(_to_rgb(image), orientation)
    except DataError:
        raise
    # Decoders raise whatever a broken file makes them trip over (OSError, SyntaxError, struct.error, zlib.error...):
    # whichever it is, the image is unusable, and the reason says why.
    except Exception as error:
        raise DataError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _open(data: bytes) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError("empty, 0 bytes")
    try:
        with warnings.catch_warnings():  # our own bound on the size follows
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"absurdly large: {error}") from error
    except UnidentifiedImageError:
        raise DataError("not a readable JPEG, PNG, WebP, GIF or BMP image") from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(
            f"declares {width} x {height} pixels ({width * height / 1e6:,.1f} megapixels), more than the "
            f"{max_pixels / 1e6:,.1f} megapixels allowed (prepare.max_image_pixels)"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(f"declares {width} x {height} pixels, longer than {MAX_ASPECT} times its width")


def _check_scans(data: bytes) -> None:
    # Compressed data never holds the marker: a 0xff in it is followed by a zero.
    scans = data.count(_SCAN) if data.startswith(_JPEG) else 0
    if scans > MAX_SCANS:
        raise DataError(f"a JPEG of {scans:,} scans, more than the {MAX_SCANS} allowed")


def _orientation(image: Image.Image) -> int:
    # A camera's broken metadata does not make its picture unusable: it is then taken as it is stored.
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
