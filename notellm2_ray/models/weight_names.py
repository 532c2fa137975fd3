"""Names of weights that vLLM does not find."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from notellm2_ray.core.errors import ModelError

_INSIDE = ("embeddings.", "encoder.layers.")  # of a CLIP or SigLIP tower


def check_weight_names(directory: Path) -> None:
    """Raise :class:`ModelError` if a vision tower has the names that transformers 5 gives it.

    Published checkpoints, and those that transformers loads and saves again, have ``vision_tower.vision_model.encoder``
    for the tower of LLaVA and Gemma 3. A model that transformers 5 saves without having loaded it has
    ``vision_tower.encoder``, which vLLM does not know.
    """
    for name in _names(directory):
        _, found, rest = name.partition("vision_tower.")
        if found and rest.startswith(_INSIDE) and ".self_attn.q_proj" in name:
            raise ModelError(
                f"{directory}: vLLM does not know the names of its weights, such as {name}, which transformers 5 gives "
                f"to models that it did not load. Published checkpoints have vision_tower.vision_model.{rest}: rename "
                "the weights that begin with vision_tower"
            )


def _names(directory: Path) -> Iterable[str]:
    """Names of the weights, without reading any weight."""
    from safetensors import SafetensorError, safe_open

    for index in directory.glob("*.safetensors.index.json"):
        return list(json.loads(index.read_text(encoding="utf-8")).get("weight_map", ()))
    names: list[str] = []
    for file in directory.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                names += weights.keys()
        except SafetensorError:  # damaged: whoever loads it says so
            continue
    return names
