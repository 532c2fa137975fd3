"""Builds the network from configurations, and its preprocessor; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.settings.model import ModelSettings, VisionPooling
from notellm2_ray.models import llm as llms
from notellm2_ray.models.embedder.mlrm import NoteModel
from notellm2_ray.models.embedder.preprocess import NotePreprocessor
from notellm2_ray.models.embedder.variants import VARIANTS
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.models.vision.tower import VisionTower, tower_from_config


def model_from_configs(
    settings: ModelSettings,
    llm_config: PretrainedConfig | None,
    vision_config: Mapping[str, Any] | None,
    image: ImageSettings | None,
    *,
    attention: str | None = None,
) -> NoteModel:
    """The network of these configurations, with random weights; on the meta device without any."""
    variant = VARIANTS[settings.variant]
    llm = tower = None
    if variant.prompt is not None:
        assert llm_config is not None
        llm = llms.llm_from_config(llm_config, attention or settings.attention)
    if variant.sees_images:
        assert vision_config is not None and image is not None
        tower = tower_from_config(vision_config, image, frozen=freezes_vision(settings), pooling=pooling_of(settings))
    return NoteModel(settings, llm, tower)


def make_preprocessor(
    settings: ModelSettings, tokenizer: Any, tower: VisionTower | None, llm_config: PretrainedConfig | None
) -> NotePreprocessor:
    """The preprocessor that goes with these parts.

    Raises:
        ModelError: the longest prompts are longer than the LLM supports.
    """
    image, num_patches = (tower.image, tower.num_patches) if tower is not None else (None, 0)
    preprocessor = NotePreprocessor(settings, tokenizer, image, num_patches)
    limit = getattr(llm_config, "max_position_embeddings", None)
    if limit is not None and preprocessor.max_tokens > limit:
        raise ModelError(
            f"the longest prompts take {preprocessor.max_tokens} tokens, but the LLM supports {limit}: lower "
            f"model.max_body_tokens ({settings.max_body_tokens}) or model.qformer.num_queries "
            f"({settings.qformer.num_queries})"
        )
    return preprocessor


def freezes_vision(settings: ModelSettings) -> bool:
    """Whether the tower is frozen: by default yes, except in the image_only variant (Table 2's CLIP ViT-B)."""
    return settings.variant != "image_only" if settings.freeze_vision is None else settings.freeze_vision


def pooling_of(settings: ModelSettings) -> VisionPooling | None:
    """How the tower pools its states; None if nothing uses the pooled vector."""
    return settings.vision_pooling if VARIANTS[settings.variant].pooled else None


def meta_encoder(
    settings: ModelSettings, llm_config: PretrainedConfig | None, vision_config: PretrainedConfig | None
) -> NoteModel:
    """The network without weights, to count its parameters."""
    image = ImageSettings(vision_config.image_size) if vision_config is not None else None
    with torch.device("meta"):
        return model_from_configs(settings, llm_config, vision_config.to_dict() if vision_config else None, image)
