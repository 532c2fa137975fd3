"""From a decoded image to the input pixels of a vision tower: resize, centre crop, uint8.

The same image always gives the same pixels (no flip, no random crop). The tower normalises on its own device, because
a uint8 image is a quarter of the size of a float one to transfer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.images import cut_middle

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LONGEST = 8  # an image that is more times as long as wide loses its ends
PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """The image format of a tower.

    Attributes:
        size: side of the tower's square input, in pixels.
        mean, std: of the channels R, G, B on the scale 0 to 1.
        resize: ``shortest`` brings the short side to ``resize_to``, ``squash`` both sides, whatever the aspect ratio;
            then the centre is cropped.
        resize_to: the length of these sides before the crop, in pixels.
        resample: Pillow's number for the filter (3: bicubic, 2: bilinear).
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Literal["shortest", "squash"] = "shortest"
    resize_to: int = 0
    resample: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "resize_to", self.resize_to or self.size)
        if self.resize_to < self.size:
            raise ModelError(f"the image processor crops {self.size} pixels out of a short side of {self.resize_to}")

    def pixels(self, image: Image.Image) -> np.ndarray:
        """``image`` (RGB, any size) as uint8 of shape (3, size, size)."""
        image = self._resized(image)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.resize == "squash":
            return image.resize((self.resize_to, self.resize_to), self.resample)
        image = cut_middle(image, _LONGEST)  # resizing all of a strip of 1 x 100,000 pixels would exhaust the memory
        width, height = image.size
        long = int(self.resize_to * max(width, height) / min(width, height))
        return image.resize((self.resize_to, long) if width <= height else (long, self.resize_to), self.resample)

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """What the tower sees of :meth:`pixels`: float32 of the same shape."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels.astype(np.float32) / 255 - mean) / std

    def blank(self) -> np.ndarray:
        """The image that is zero after normalisation (the mean colour), uint8 of shape (3, size, size)."""
        colour = np.rint(np.array(self.mean) * 255).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(colour[:, None, None], (3, self.size, self.size)))

    def save(self, directory: Path) -> None:
        """Write the image processor's file of a model directory, in Hugging Face's format."""
        shortest = self.resize == "shortest"
        side = self.resize_to
        values = {
            "image_processor_type": "CLIPImageProcessor" if shortest else "SiglipImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": side} if shortest else {"height": side, "width": side},
            "resample": self.resample,
            "do_center_crop": shortest or side > self.size,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }
        (directory / PREPROCESSOR_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def from_processor(values: Mapping[str, Any], image_size: int | None, where: str) -> ImageSettings:
    """Settings from the dictionary of a Hugging Face image processor.

    Args:
        image_size: side of the tower's input, in pixels; None: what the processor makes.

    Raises:
        ModelError: the processor's images do not fit the tower, or it does more than resize, crop and normalise.
    """
    other = [key for key in ("do_pad", "do_flip_channel_order") if values.get(key)]
    if other or not values.get("do_resize", True):
        raise ModelError(f"{where}: its image processor ({other[0] if other else 'do_resize: false'}) is not supported")
    size = values.get("size", image_size)
    crops = values.get("do_center_crop", "Siglip" not in values.get("image_processor_type", "CLIP"))
    if isinstance(size, int):
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    resize_to, made = _side(size), _side(values.get("crop_size", image_size) if crops else size)
    shortest = "height" not in size
    if resize_to is None or made is None or (shortest and not crops):
        raise ModelError(f"{where}: its image processor does not make square images (size {dict(size)})")
    if made != (image_size or made):
        raise ModelError(f"{where}: its image processor makes images of {made} pixels, its tower takes {image_size}")
    # Values times rescale_factor are normalised; ours are on the scale 0 to 1.
    scale = 255 * float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 255.0
    mean, std = values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_STD)
    if not values.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return ImageSettings(
        made,
        tuple(value / scale for value in mean),  # type: ignore[arg-type]
        tuple(value / scale for value in std),  # type: ignore[arg-type]
        "shortest" if shortest else "squash",
        resize_to,
        int(values.get("resample", 3)),
    )


def _side(size: int | Mapping[str, int] | None) -> int | None:
    """The side of a square, or the length that the shortest side is brought to; None: neither."""
    if size is None or isinstance(size, int):
        return size
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return int(size["height"]) if size.get("height") == size.get("width", 0) else None
