"""The image format of a tower, read off its image processor: Hugging Face's, or timm's data configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.models.vision.pixels import ImageSettings, from_processor

_HALF = (0.5, 0.5, 0.5)
_KEYS = (
    "size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "resample", "do_pad", "do_flip_channel_order",
)  # fmt: skip
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "random": 2}
_MAX_DIFFERENCE = 2.0  # levels of 255, on average over an image; Pillow and torchvision differ by some 0.3


def load_image_settings(name: str, config: PretrainedConfig) -> ImageSettings:
    """The image format of the tower at ``name``, a directory or hub name.

    Args:
        config: the tower's configuration, for families that work without an image processor.

    Raises:
        ModelError: there is no image processor, or it does more than resize, crop and normalise.
    """
    if config.model_type == "siglip2_vision_model":
        # Its processor cuts images of any shape into patches; here they are the square of the position embeddings.
        size = math.isqrt(config.num_patches) * config.patch_size
        return ImageSettings(size, _HALF, _HALF, resize="squash", resample=2)
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except OSError as error:
        return _family_default(name, config, error)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name}: its image processor cannot be read: {first_line(error)}") from error
    if hasattr(processor, "data_config"):
        settings = from_timm(processor.data_config, name)
    else:
        settings = from_processor(_resolved(processor), None, name)
    _check(processor, settings, name)
    return settings


def _family_default(name: str, config: PretrainedConfig, error: OSError) -> ImageSettings:
    if config.model_type == "clip_vision_model":
        return ImageSettings(config.image_size)
    if config.model_type == "siglip_vision_model":
        return ImageSettings(config.image_size, _HALF, _HALF, resize="squash")
    raise ModelError(
        f"{name} has no preprocessor_config.json, which tells the size, mean and deviation of its images: "
        f"{first_line(error)}"
    )


def _resolved(processor: Any) -> dict[str, Any]:
    """A processor's values, with the defaults of its class for those that its file leaves out."""
    values: dict[str, Any] = {key: getattr(processor, key, None) for key in _KEYS}
    for key in ("size", "crop_size"):
        if values[key] is not None:
            values[key] = {side: pixels for side, pixels in dict(values[key]).items() if pixels is not None}
    values["do_center_crop"] = bool(values["do_center_crop"])
    return {key: value for key, value in values.items() if value is not None}


def from_timm(data_config: Mapping[str, Any], where: str) -> ImageSettings:
    """Settings from timm's data configuration (``timm.data.resolve_data_config``).

    Raises:
        ModelError: it pads images, or they are not square.
    """
    _, height, width = data_config["input_size"]
    mode = data_config.get("crop_mode") or "center"
    if height != width or mode not in ("center", "squash"):
        raise ModelError(f"{where}: images of {height} x {width} pixels, crop mode {mode!r}, are not supported")
    return ImageSettings(
        height,
        tuple(data_config["mean"]),
        tuple(data_config["std"]),
        "squash" if mode == "squash" else "shortest",
        math.floor(height / data_config["crop_pct"]),
        _FILTERS[data_config["interpolation"]],
    )


def _check(processor: Any, settings: ImageSettings, name: str) -> None:
    """Raise :class:`ModelError` unless the processor makes of a picture what ``settings`` make of it."""
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    side = 2 * settings.resize_to
    picture = Image.fromarray(colours).resize((3 * side // 2, side), Image.Resampling.BICUBIC)
    ours = settings.normalised(settings.pixels(picture))
    try:
        theirs = np.asarray(processor(picture, return_tensors="pt")["pixel_values"][0], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{name}: its image processor makes no pixels of a picture: {first_line(error)}") from error
    if theirs.shape != ours.shape:
        raise ModelError(f"{name}: its image processor makes arrays of shape {theirs.shape}, not {ours.shape}")
    levels = np.abs(theirs - ours).mean(axis=(1, 2)) * np.array(settings.std) * 255
    if levels.mean() > _MAX_DIFFERENCE:
        raise ModelError(
            f"{name}: its image processor ({type(processor).__name__}) does more than resize, crop and normalise: "
            f"on a test picture its pixels differ by {levels.mean():.1f} of 255 levels on average"
        )
