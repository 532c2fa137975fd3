"""The vision tower V_theta: from pixels to patch features and one pooled vector.

Any vision encoder whose last hidden state holds one state per square patch of the image, after a few states of other
tokens (CLS, registers). An OpenCLIP tower (:mod:`~notellm2_ray.models.vision.openclip`) is converted to Hugging Face's
CLIP, and a timm model is wrapped by transformers. So a Hugging Face configuration describes every tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from notellm2_ray.core.settings.model import VisionPooling
from notellm2_ray.models.vision import families
from notellm2_ray.models.vision.pixels import ImageSettings

_OURS = "tower"  # key in the configuration of a saved tower for what Hugging Face's configuration cannot tell


class Views(NamedTuple):
    """A tower's features of N images."""

    patches: torch.Tensor  # (N, L, h_v), without CLS
    pooled: torch.Tensor  # (N, h_p): see ``model.vision_pooling``


class VisionTower(nn.Module):
    """A tower that takes uint8 images and normalises them itself.

    Args:
        pooling: how the pooled vector is made; None: nothing uses it, so that parameters for it are dropped.
        projection: from the model's own pooled vector to the space that it shares with texts, without bias.

    Attributes:
        config: its Hugging Face vision configuration.
        image: its image format.
        frozen: whether it gets no gradients and stays in evaluation mode.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        image: ImageSettings,
        *,
        frozen: bool,
        pooling: VisionPooling | None = "auto",
        projection: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.config: PretrainedConfig = model.config
        self.image, self.frozen, self.pooling = image, frozen, pooling
        self.model, self.projection = model, projection
        if pooling not in ("auto", "projected"):
            drop_head(model)
        if pooling != "projected" and self._is_clip:
            # Nothing uses CLS after this norm. Its parameters would get no gradient, which data parallelism rejects.
            getattr(model, "vision_model", model).post_layernorm = nn.Identity()
        self.register_buffer("mean", _channels(image.mean), persistent=False)
        self.register_buffer("std", _channels(image.std), persistent=False)
        self.requires_grad_(not frozen).train(not frozen)

    @property
    def _is_clip(self) -> bool:
        return self.config.model_type == "clip_vision_model"

    @property
    def width(self) -> int:
        """h_v."""
        return self.config.hidden_size

    @property
    def pooled_width(self) -> int:
        """h_p."""
        return self.width if self.projection is None else self.projection.out_features

    @property
    def num_patches(self) -> int:
        """L."""
        patch = families.side(self.config.patch_size)
        assert patch is not None
        return (self.image.size // patch) ** 2

    def describe(self) -> dict[str, Any]:
        """The configuration that :func:`tower_from_config` makes the same network of."""
        ours: dict[str, Any] = {}
        if self.projection is not None:
            ours["projection"] = list(self.projection.weight.shape)
        if self.pooling == "auto" and getattr(self.model, "pooler", ...) is None:
            ours["head"] = False
        return self.config.to_dict() | ({_OURS: ours} if ours else {})

    def train(self, mode: bool = True) -> VisionTower:
        return super().train(mode and not self.frozen)

    def forward(self, pixels: torch.Tensor) -> Views:
        """Features of images (N, 3, size, size), uint8."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.output(pixels)
            states = output.last_hidden_state
            patches = states[:, states.shape[1] - self.num_patches :]
            return Views(patches, self._pooled(states, patches, output))

    def output(self, pixels: torch.Tensor) -> Any:
        """The model's own output for images (N, 3, size, size), uint8."""
        dtype = next(self.model.parameters()).dtype
        images = ((pixels.to(torch.float32) / 255 - self.mean.float()) / self.std.float()).to(dtype)
        if self.config.model_type == "siglip2_vision_model":
            return self._siglip2(images)
        return self.model(pixel_values=images)

    def _pooled(self, states: torch.Tensor, patches: torch.Tensor, output: Any) -> torch.Tensor:
        if self.pooling == "projected":
            return output.pooler_output if self.projection is None else self.projection(output.pooler_output)
        if self.pooling == "cls" or (self.pooling == "auto" and self._is_clip):
            return states[:, 0]
        head = getattr(output, "pooler_output", None)
        if self.pooling == "auto" and head is not None:
            return head
        has_cls = states.shape[1] > patches.shape[1]
        return states[:, 0] if self.pooling == "auto" and has_cls else patches.mean(dim=1)

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


def drop_head(model: PreTrainedModel) -> None:
    """Take away the part of a model that pools its states, as far as the model works without it."""
    if getattr(model, "use_head", False):
        model.use_head, model.head = False, None  # type: ignore[assignment]
    elif isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # type: ignore[assignment]
    elif hasattr(model.config, "do_pooling"):
        model.config.do_pooling = False


def _channels(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def tower_from_config(
    values: Mapping[str, Any], image: ImageSettings, *, frozen: bool, pooling: VisionPooling | None = "auto"
) -> VisionTower:
    """A tower with random weights (on the meta device: without any) from what :meth:`VisionTower.describe` gave."""
    ours = values.get(_OURS, {})
    config = families.config_from_dict({key: value for key, value in values.items() if key != _OURS})
    network = families.model_class(config)
    model = network._from_config(config, **families.attention(network))
    if ours.get("head") is False:
        drop_head(model)
    projection = None
    if "projection" in ours:
        width, own = ours["projection"]
        projection = nn.Linear(own, width, bias=False)
    return VisionTower(model, image, frozen=frozen, pooling=pooling, projection=projection)
