"""Which image formats are read, told by a file's first bytes.

Only formats that notes really have are tried, so that a file cannot reach a rarely used decoder.
"""

from __future__ import annotations

import struct

from notellm2_ray.core.errors import DataError

# Pillow's names. A camera's MPO (several JPEGs in one file) is opened as a JPEG, and its first picture counts.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")
READABLE = "JPEG, PNG, WebP, GIF, BMP, AVIF or TIFF"
_ENDINGS = ".jpg .jpeg .jfif .mpo .png .webp .gif .bmp .avif .tif .tiff .heic .heif"
ENDINGS = tuple(_ENDINGS.split())
HEIC_MISSING = (
    "a HEIC image (the format of iPhones), which needs the optional package pillow-heif: pip install "
    "'notellm2-ray[heic]' on every machine, or convert the images to JPEG"
)

_BEGINNINGS = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"II+\0": "image/tiff",  # BigTIFF
    b"MM\0+": "image/tiff",
}
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
_MAX_BRANDS = 64


def content_type(data: bytes) -> str:
    """The content type of an encoded image; ``application/octet-stream`` for an unknown one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    brands = _brands(data)
    if brands & {b"avif", b"avis"}:
        return "image/avif"
    if brands & _HEIC_BRANDS:
        return "image/heic"
    return next((kind for begin, kind in _BEGINNINGS.items() if data.startswith(begin)), "application/octet-stream")


def pillow_formats(data: bytes) -> tuple[str, ...]:
    """The names of Pillow's decoders to try.

    Raises:
        DataError: it is a HEIC image, and the optional package that reads it is not installed.
    """
    kind = content_type(data)
    if kind == "image/heic":
        try:
            import pillow_heif
        except ImportError:
            raise DataError(HEIC_MISSING) from None
        pillow_heif.register_heif_opener()
        return ("HEIF",)
    if kind == "image/avif":
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # its default is all cores, whatever the caller has reserved
    return FORMATS


def _brands(data: bytes) -> set[bytes]:
    """The brands of a file in the container that AVIF and HEIC share."""
    if data[4:8] != b"ftyp" or len(data) < 12:
        return set()
    size = min(struct.unpack(">I", data[:4])[0], 16 + 4 * _MAX_BRANDS)
    return {data[8:12], *(data[place : place + 4] for place in range(16, size, 4))}
