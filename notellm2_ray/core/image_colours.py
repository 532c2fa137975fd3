"""Pictures of any colour mode as RGB, the way that a reader sees them on a white page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture as RGB.

    Transparent parts lie on white. 16-bit grey is scaled to 8 bits; Pillow's own conversion would clip it to white.
    CMYK is converted by the profile in the file where it has one, and otherwise by Pillow's plain formula.
    """
    from PIL import Image

    if image.mode[0] in "IF":  # integers of 16 or 32 bits, and floats
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "CMYK":
        return _by_profile(image) or image.convert("RGB")
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:  # of a 16-bit PNG, whose pixels Pillow has cut to 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """(H, W) uint8: floats count from 0 to 1, or to 255 where a larger one is there; integers from 0 to 65,535."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
        grey = values * (255.0 if values.max() <= 1 else 1.0)
    else:
        grey = values.astype(np.int64) >> 8
    grey = np.clip(grey, 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    return np.where(values == transparent, np.uint8(255), grey) if isinstance(transparent, int) else grey


def _by_profile(image: Image.Image) -> Image.Image | None:
    """A CMYK picture converted by the colour profile in its file; None: it has none, or a broken one."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
