"""Builds untrained embedders of any kind."""

from __future__ import annotations

from torch import nn

from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.embedder.kinds import kind_of


def build_encoder(
    settings: ModelSettings, seed: int, *, llm_path: str, vision_path: str, precision: str = "fp32"
) -> NoteEncoder:
    """An untrained embedder: pretrained LLM and vision tower, everything else randomly initialised.

    Args:
        seed: of the random parts; equal seeds give equal weights.
        llm_path, vision_path: paths or names of ``settings.llm`` and ``settings.vision``. A part that the embedder does
            not have is not loaded.
        precision: of the weights, ``fp32`` or ``bf16``.

    Raises:
        ConfigError: there is no such kind of embedder.
        ModelError: a part is missing, incomplete or not of the right kind.
    """
    network, preprocessor = kind_of(settings).build(settings, seed, llm_path, vision_path, precision)
    return NoteEncoder(network.to_precision(precision).eval(), preprocessor)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, on any device."""
    return sum(parameter.numel() for parameter in module.parameters())
