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
        resize: ``shortest`` brings the short side to ``resize_to`` and crops the centre; ``squash`` ignores the
            aspect ratio.
        resize_to: the short side before the crop.
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
        if self.resize == "squash":
            image = image.resize((self.size, self.size), self.resample)
        else:
            image = self._shortest_then_crop(image)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

    def _shortest_then_crop(self, image: Image.Image) -> Image.Image:
        image = cut_middle(image, _LONGEST)  # resizing all of a strip of 1 x 100,000 pixels would exhaust the memory
        width, height = image.size
        short, long = min(width, height), int(self.resize_to * max(width, height) / min(width, height))
        target = (self.resize_to, long) if width == short else (long, self.resize_to)
        image = image.resize(target, self.resample)
        left, top = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def blank(self) -> np.ndarray:
        """The image that is zero after normalisation (the mean colour), uint8 of shape (3, size, size)."""
        colour = np.rint(np.array(self.mean) * 255).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(colour[:, None, None], (3, self.size, self.size)))

    def save(self, directory: Path) -> None:
        """Write the image processor's file of a model directory, in Hugging Face's format."""
        square = {"height": self.size, "width": self.size}
        crop = self.resize == "shortest"
        values = {
            "image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.resize_to} if crop else square,
            "resample": self.resample,
            "do_center_crop": crop,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }
        (directory / PREPROCESSOR_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def from_processor(values: Mapping[str, Any], image_size: int, where: str) -> ImageSettings:
    """Settings from the dictionary of a Hugging Face image processor, for a tower of ``image_size`` pixels.

    Raises:
        ModelError: the processor's images do not fit the tower.
    """
    size = values.get("size", image_size)
    mean, std = values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_STD)
    common: dict[str, Any] = {
        "size": image_size,
        "mean": tuple(mean) if values.get("do_normalize", True) else (0.0, 0.0, 0.0),
        "std": tuple(std) if values.get("do_normalize", True) else (1.0, 1.0, 1.0),
        "resample": int(values.get("resample", 3)),
    }
    crops = values.get("do_center_crop", "Siglip" not in values.get("image_processor_type", "CLIP"))
    if isinstance(size, int):
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    made = _side(values.get("crop_size", image_size)) if crops else _side(size)
    if made != image_size:
        raise ModelError(f"{where}: its image processor makes images of {made} pixels, its tower takes {image_size}")
    if "shortest_edge" not in size:
        return ImageSettings(resize="squash", **common)
    return ImageSettings(resize="shortest", resize_to=int(size["shortest_edge"]), **common)


def _side(size: int | Mapping[str, int]) -> int | None:
    if isinstance(size, int):
        return size
    height = size.get("height", size.get("shortest_edge"))
    return height if size.get("width", height) == height else None
