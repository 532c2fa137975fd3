"""The vision tower V_theta: from pixels to patch features and one pooled vector.

Hugging Face CLIP, SigLIP and SigLIP 2. An OpenCLIP tower (:mod:`~notellm2_ray.models.vision.openclip`) has CLIP's
architecture and is converted to it. The Hugging Face vision configuration fully describes a tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.llm import first_line, require_all_weights
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.vision import openclip
from notellm2_ray.models.vision.pixels import ImageSettings, from_processor

_KINDS: Mapping[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "siglip2_vision_model": (Siglip2VisionConfig, Siglip2VisionModel),
}
_HALF = (0.5, 0.5, 0.5)
_NEEDED = (
    "model.vision needs the directory or hub name of a CLIP, SigLIP or OpenCLIP model (config.json or "
    "open_clip_config.json, and *.safetensors), or openclip:ARCHITECTURE:PRETRAINED"
)


class Views(NamedTuple):
    """A tower's features of N images."""

    patches: torch.Tensor  # (N, L, h_v), without CLS
    pooled: torch.Tensor  # (N, h_v): CLIP's CLS before the last layer norm, SigLIP's attention pooling


class VisionTower(nn.Module):
    """A tower that takes uint8 images and normalises them itself.

    Attributes:
        config: its Hugging Face vision configuration.
        image: its image format.
        frozen: whether it gets no gradients and stays in evaluation mode.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: PreTrainedModel, image: ImageSettings, *, frozen: bool, pool: bool = True) -> None:
        super().__init__()
        self.config: PretrainedConfig = model.config
        self.image, self.frozen = image, frozen
        self.model = model
        if self.config.model_type == "clip_vision_model":
            # Nothing uses CLS after this norm. Its parameters would get no gradient, which data parallelism rejects.
            getattr(model, "vision_model", model).post_layernorm = nn.Identity()
        elif not pool and getattr(model, "use_head", False):
            model.use_head, model.head = False, None  # type: ignore[assignment]
        self.register_buffer("mean", _channels(image.mean), persistent=False)
        self.register_buffer("std", _channels(image.std), persistent=False)
        self.requires_grad_(not frozen).train(not frozen)

    @property
    def width(self) -> int:
        """h_v."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        """L."""
        return (self.image.size // self.config.patch_size) ** 2

    def train(self, mode: bool = True) -> VisionTower:
        return super().train(mode and not self.frozen)

    def forward(self, pixels: torch.Tensor) -> Views:
        """Features of images (N, 3, size, size), uint8."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            dtype = next(self.model.parameters()).dtype
            images = ((pixels.to(torch.float32) / 255 - self.mean.float()) / self.std.float()).to(dtype)
            if self.config.model_type == "siglip2_vision_model":
                output = self._siglip2(images)
            else:
                output = self.model(pixel_values=images)
            states = output.last_hidden_state
            if self.config.model_type == "clip_vision_model":
                return Views(states[:, 1:], states[:, 0])
            pooled = output.pooler_output
            return Views(states, states.mean(dim=1) if pooled is None else pooled)

    def _siglip2(self, images: torch.Tensor) -> Any:
        """SigLIP 2 takes patches and the shape of their grid: here the square that its position embeddings are for."""
        num, patch = len(images), self.config.patch_size
        side = self.image.size // patch
        patches = images.reshape(num, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        return self.model(
            pixel_values=patches.reshape(num, side * side, patch * patch * 3),
            pixel_attention_mask=torch.ones(num, side * side, dtype=torch.long, device=images.device),
            spatial_shapes=torch.full((num, 2), side, dtype=torch.long, device=images.device),
        )


def _channels(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def tower_from_config(
    values: Mapping[str, Any], image: ImageSettings, *, frozen: bool, pool: bool = True
) -> VisionTower:
    """A tower with random weights (on the meta device: without any) from a vision configuration's dictionary."""
    config_class, model_class = _KINDS[values["model_type"]]
    model = model_class._from_config(config_class.from_dict(dict(values)), attn_implementation="sdpa")
    return VisionTower(model, image, frozen=frozen, pool=pool)


@quiet_loading()
def load_tower(name: str, *, frozen: bool, pool: bool = True, dtype: torch.dtype = torch.float32) -> VisionTower:
    """The pretrained tower called ``name`` in the settings.

    Args:
        name: directory or hub name of a CLIP, SigLIP or SigLIP 2 (whole or its vision half); directory of an OpenCLIP;
            ``openclip:ARCHITECTURE[:PRETRAINED]``.
        pool: whether the pooled vector is used; if not, a SigLIP drops its pooling head.

    Raises:
        ModelError: the model does not exist, is of another kind, or lacks weights.
    """
    if name.startswith("openclip:") or openclip.is_directory(name):
        converted, image = openclip.load(name)
        return VisionTower(converted.to(dtype=dtype), image, frozen=frozen, pool=pool)  # type: ignore[call-arg]
    config = load_vision_config(name)
    model_class: Any = _KINDS[config.model_type][1]
    try:
        model, report = model_class.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"the weights of {name} cannot be loaded: {first_line(error)}") from error
    require_all_weights(report, name)
    return VisionTower(model, load_image_settings(name, config), frozen=frozen, pool=pool)


def load_vision_config(name: str) -> PretrainedConfig:
    """Configuration of the vision half of the model at ``name``.

    Raises:
        ModelError: the model does not exist or is of another kind.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name} is not a model directory: it has no config.json. {_NEEDED}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name} cannot be read as a model: {first_line(error)}. {_NEEDED}") from error
    vision = getattr(config, "vision_config", config) if config.model_type in ("clip", "siglip", "siglip2") else config
    if vision.model_type not in _KINDS:
        raise ModelError(f"{name} is a {config.model_type}, which has no vision tower of a supported kind. {_NEEDED}")
    return vision


def load_image_settings(name: str, config: PretrainedConfig) -> ImageSettings:
    """The image format of the tower at ``name``: from its image processor, or its family's default if it has none."""
    if config.model_type == "siglip2_vision_model":
        size = math.isqrt(config.num_patches) * config.patch_size
        return ImageSettings(size, _HALF, _HALF, resize="squash", resample=2)
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        values = {}
    if not values and config.model_type == "siglip_vision_model":
        return ImageSettings(config.image_size, _HALF, _HALF, resize="squash")
    return from_processor(values, config.image_size, name)
