"""Embedders from settings: with pretrained parts, from a saved configuration, or without weights at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models import llm as llms
from notellm2_ray.models.encoder import NoteEncoder
from notellm2_ray.models.mlrm import NoteModel
from notellm2_ray.models.pixels import ImageSettings
from notellm2_ray.models.preprocess import NotePreprocessor
from notellm2_ray.models.variants import VARIANTS
from notellm2_ray.models.vision import VisionTower, load_tower, tower_from_config


def build_encoder(
    settings: ModelSettings, seed: int, *, llm_path: str, vision_path: str, precision: str = "fp32"
) -> NoteEncoder:
    """An untrained embedder: pretrained LLM and tower, everything between and after them random.

    Args:
        seed: of the random parts; equal seeds give equal weights, whatever ran before.
        llm_path, vision_path: what ``settings.llm`` and ``settings.vision`` stand for. The tokenizer is always the
            LLM's; other parts that the variant does not have are not loaded.
        precision: of the weights, ``fp32`` or ``bf16``.

    Raises:
        ModelError: a part is missing, incomplete or of another kind.
    """
    variant = VARIANTS[settings.variant]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokenizer = llms.load_tokenizer(llm_path, settings.revision)
    llm = tower = None
    if variant.prompt is not None:
        llm = llms.load_llm(llm_path, settings.attention, dtype, settings.revision)
        llms.embed_added_tokens(llm, tokenizer)
    if variant.sees_images:
        tower = load_tower(vision_path, frozen=freezes_vision(settings), pool=variant.pooled, dtype=dtype)
    with random_stream(seed, "connector, fusion and projection"):
        model = NoteModel(settings, llm, tower)
    preprocessor = make_preprocessor(settings, tokenizer, tower, llm.config if llm is not None else None)
    return NoteEncoder(model.to_precision(precision).eval(), preprocessor)


def model_from_configs(
    settings: ModelSettings,
    llm_config: PretrainedConfig | None,
    vision_config: Mapping[str, Any] | None,
    image: ImageSettings | None,
    *,
    attention: str | None = None,
) -> NoteModel:
    """A network of these configurations with random weights, or with none on the meta device."""
    variant = VARIANTS[settings.variant]
    llm = tower = None
    if variant.prompt is not None:
        assert llm_config is not None
        llm = llms.llm_from_config(llm_config, attention or settings.attention)
    if variant.sees_images:
        assert vision_config is not None and image is not None
        tower = tower_from_config(vision_config, image, frozen=freezes_vision(settings), pool=variant.pooled)
    return NoteModel(settings, llm, tower)


def meta_encoder(
    settings: ModelSettings, llm_config: PretrainedConfig | None, vision_config: PretrainedConfig | None
) -> NoteModel:
    """The network without weights, to count its parameters."""
    image = ImageSettings(vision_config.image_size) if vision_config is not None else None
    with torch.device("meta"):
        return model_from_configs(settings, llm_config, vision_config.to_dict() if vision_config else None, image)


def make_preprocessor(
    settings: ModelSettings, tokenizer: Any, tower: VisionTower | None, llm_config: PretrainedConfig | None
) -> NotePreprocessor:
    """The preprocessor that goes with these parts.

    Raises:
        ModelError: its longest prompts are longer than what the LLM was made for.
    """
    image, num_patches = (tower.image, tower.num_patches) if tower is not None else (None, 0)
    preprocessor = NotePreprocessor(settings, tokenizer, image, num_patches)
    limit = getattr(llm_config, "max_position_embeddings", None)
    if limit is not None and preprocessor.max_tokens > limit:
        raise ModelError(
            f"the longest prompts take {preprocessor.max_tokens} tokens, but the LLM was made for {limit}: lower "
            f"model.max_body_tokens ({settings.max_body_tokens}) or model.qformer.num_queries "
            f"({settings.qformer.num_queries})"
        )
    return preprocessor


def freezes_vision(settings: ModelSettings) -> bool:
    """Whether the tower stays as it is: by default yes, except where it is all there is (Table 2's CLIP ViT-B)."""
    return settings.variant != "image_only" if settings.freeze_vision is None else settings.freeze_vision


@contextlib.contextmanager
def random_stream(seed: int, name: str) -> Iterator[None]:
    """Torch's CPU generator seeded by the named stream inside, and left untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, name))
        yield


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, on any device."""
    return sum(parameter.numel() for parameter in module.parameters())
