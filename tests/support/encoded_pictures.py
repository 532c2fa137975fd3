"""One picture in every encoding that notes have."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

HEIC = bytes.fromhex("0000001c66747970686569630000000068656963") + b"\0" * 64


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def seen() -> Image.Image:
    """What a reader sees: a grey disc of two shades on white, 64 x 48."""
    y, x = np.mgrid[:48, :64]
    grey = np.full((48, 64), 255, np.uint8)
    grey[(x - 20) ** 2 + (y - 20) ** 2 < 200] = 64
    grey[(x - 45) ** 2 + (y - 30) ** 2 < 100] = 160
    return Image.fromarray(grey).convert("RGB")


def with_hole(mode: str) -> Image.Image:
    """The same picture, transparent where it is white; the hidden pixels there are black."""
    rgb = np.asarray(seen())
    hole = (rgb == 255).all(-1)
    image = Image.fromarray(np.dstack([np.where(hole[..., None], 0, rgb), np.where(hole, 0, 255)]).astype(np.uint8))
    return image.convert(mode)


def palette_with_hole() -> tuple[Image.Image, int]:
    rgb = np.asarray(seen())[..., 0]
    image = Image.fromarray(np.searchsorted([64, 160, 255], rgb).astype(np.uint8), "P")
    image.putpalette([64] * 3 + [160] * 3 + [9, 200, 9])
    return image, 2


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(seen())[..., 0].astype(np.uint16) * 257)


def turned(format_: str, orientation: int, **options) -> bytes:
    """The picture as a camera stores it that was held in another way, with the tag that says so."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # numbers of Pillow's transpositions
    image = seen() if orientation == 1 else seen().transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, format_, exif=exif, **options)


PALETTE, HOLE = palette_with_hole()
LOSSLESS = {
    "PNG": encoded(seen(), "PNG"),
    "GIF": encoded(seen(), "GIF"),
    "BMP": encoded(seen(), "BMP"),
    "WebP": encoded(seen(), "WEBP", lossless=True),
    "TIFF": encoded(seen(), "TIFF"),
    "TIFF LZW": encoded(seen(), "TIFF", compression="tiff_lzw"),
    "grey": encoded(seen().convert("L"), "PNG"),
    "grey of 16 bits": encoded(sixteen_bits(), "PNG"),
    "TIFF of 16 bits": encoded(sixteen_bits(), "TIFF"),
    "TIFF of floats": encoded(Image.fromarray(np.asarray(seen())[..., 0].astype(np.float32)), "TIFF"),
    "RGBA": encoded(with_hole("RGBA"), "PNG"),
    "RGBA WebP": encoded(with_hole("RGBA"), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": encoded(with_hole("RGBA"), "TIFF"),
    "grey and alpha": encoded(with_hole("LA"), "PNG"),
    "palette and hole": encoded(PALETTE, "PNG", transparency=HOLE),
    "GIF and hole": encoded(PALETTE, "GIF", transparency=HOLE),
    "colour key": encoded(seen(), "PNG", transparency=(255, 255, 255)),
    "CMYK TIFF": encoded(seen().convert("CMYK"), "TIFF"),
    **{f"{f} turned {o}": turned(f, o) for f in ("PNG", "TIFF") for o in range(1, 9)},
}
LOSSY = {
    "JPEG": encoded(seen(), "JPEG", quality=98),
    "MPO": encoded(seen(), "MPO", quality=98, save_all=True, append_images=[seen().rotate(180)]),
    "AVIF": encoded(seen(), "AVIF", quality=98),
    "RGBA AVIF": encoded(with_hole("RGBA"), "AVIF", quality=98),
    "WebP lossy": encoded(seen(), "WEBP", quality=98),
    "CMYK JPEG": encoded(seen().convert("CMYK"), "JPEG", quality=98),
    **{f"{f} turned {o}": turned(f, o, quality=98) for f in ("JPEG", "WEBP", "AVIF") for o in (3, 6, 7)},
}
