"""What is known of a model before an engine is started: its configuration, and whether vLLM can run it at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.models.weight_names import check_weight_names

# Any of these keys in a config means that the model has an image tower.
_IMAGE_KEYS = ("vision_config", "vision_tower", "mm_vision_tower", "visual", "image_token_id", "image_token_index")


class ModelFacts(NamedTuple):
    """What a model's configuration says about it."""

    model: str  # directory (absolute) or name on the hub
    architecture: str
    reads_images: bool
    context: int | None  # the most tokens that its positions allow; None if the configuration does not say
    fingerprint: str  # changes with the files of the model, or for a model on the hub with its name


def check_model(model: Path | str, *, images: bool) -> ModelFacts:
    """Read a model's configuration, without loading anything heavy.

    Args:
        model: directory in Hugging Face layout, or a name on the hub.
        images: whether the model must read images.

    Raises:
        ModelError: there is no such model, its config.json is damaged or names no architecture, the model must read
            images and does not, or vLLM does not know its weights' names.
    """
    name, config = read_config(str(model))
    architectures = config.get("architectures") or []
    if not architectures:
        raise ModelError(f"{name}: its config.json names no architecture, so it is not a model that vLLM can run")
    reads_images = any(key in config for key in _IMAGE_KEYS)
    if images and not reads_images:
        raise ModelError(
            f"{name}: {architectures[0]} reads no images; an image-text model (LLaVA, Qwen2-VL, ...) is needed here"
        )
    if reads_images and Path(name).is_dir():
        check_weight_names(Path(name))
    text = config.get("text_config") or config.get("llm_config") or config
    context = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    return ModelFacts(name, architectures[0], reads_images, context, files_fingerprint(name))


def read_config(model: str) -> tuple[str, dict[str, Any]]:
    """The model's absolute directory or hub name, and its configuration."""
    path = Path(model)
    if not (path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") != 1):
        return model, _hub_config(model)
    if not path.is_dir():
        raise ModelError(f"{model}: there is no model directory; train or download one first, or correct the path")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{model} is not a model directory in Hugging Face layout: it has no config.json") from None
    except ValueError as error:
        raise ModelError(f"{path / 'config.json'} is damaged ({error}): copy the model again") from error
    return str(path.absolute()), config


def _hub_config(model: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model} is neither a directory nor a model that can be loaded from the hub: {error}"
        ) from error
