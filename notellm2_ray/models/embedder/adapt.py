"""LoRA on an embedder's LLM while it is trained; what is saved is a plain embedder, with LoRA merged into its weights.

Connector, fusion, projection and temperature are trained in full. The LLM's token embeddings are frozen, those of the
two added tokens too: <IMG> is replaced by the visual tokens, and <IMG_EMB> stands in the same place of every prompt, a
constant that the adapted layers above it can learn to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.train import LoraSettings
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.embedder.kinds import adapted_module
from notellm2_ray.models.lora import add_lora

if TYPE_CHECKING:
    from peft import PeftModel


def adapt_llm(encoder: NoteEncoder, lora: LoraSettings, seed: int) -> PeftModel:
    """Put LoRA on the embedder's LLM, in place; equal seeds give equal matrices.

    Raises:
        ConfigError: the embedder has no LLM.
        ModelError: the LLM has no linear layer.
    """
    return add_lora(
        encoder.model.get_submodule(adapted_module(encoder.settings)),
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        seed=stream_seed(seed, "embedder", "lora"),
    )


def save_merged(encoder: NoteEncoder, lora: LoraSettings, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write an embedder with trained weights in it, LoRA merged, as a plain embedder.

    The sums are made in the type of the embedder's weights: float32, as a new one's are.

    Args:
        encoder: untrained and without LoRA; it is used up.
        weights: the trained ones of an embedder that :func:`adapt_llm` adapted, by its parameters' names.
    """
    adapted = adapt_llm(encoder, lora, seed=0)
    unknown = encoder.model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    adapted.merge_and_unload()
    encoder.save_pretrained(directory)
