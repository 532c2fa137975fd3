"""Embedders from settings: with pretrained parts, or without weights at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models import llm as llms
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.embedder.mlrm import NoteModel
from notellm2_ray.models.embedder.network import freezes_vision, make_preprocessor, model_from_configs
from notellm2_ray.models.embedder.variants import VARIANTS
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.models.vision.tower import load_tower


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


def meta_encoder(
    settings: ModelSettings, llm_config: PretrainedConfig | None, vision_config: PretrainedConfig | None
) -> NoteModel:
    """The network without weights, to count its parameters."""
    image = ImageSettings(vision_config.image_size) if vision_config is not None else None
    with torch.device("meta"):
        return model_from_configs(settings, llm_config, vision_config.to_dict() if vision_config else None, image)


@contextlib.contextmanager
def random_stream(seed: int, name: str) -> Iterator[None]:
    """Torch's CPU generator seeded by the named stream inside, and left untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, name))
        yield


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, on any device."""
    return sum(parameter.numel() for parameter in module.parameters())
