"""Which part of a Hugging Face model is its vision encoder, and which class has its network.

Both follow from the configuration. No family is named here: whether the network gives states of square patches is
proved by its output (:mod:`~notellm2_ray.models.vision.proof`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from notellm2_ray.core.errors import ModelError, first_line

NEEDED = (
    "model.vision needs the directory or hub name of a vision encoder with states of square patches, such as a CLIP, "
    "SigLIP, DINOv2, DINOv3 or ViT (config.json and *.safetensors, or open_clip_config.json), "
    "openclip:ARCHITECTURE[:PRETRAINED] or timm:ARCHITECTURE[:PRETRAINED]"
)


def load_vision_config(name: str) -> PretrainedConfig:
    """Configuration of the vision half of the model at ``name``, a directory or hub name.

    Raises:
        ModelError: the model does not exist, or has no vision encoder.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name} is not a model directory: it has no config.json. {NEEDED}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name} cannot be read as a model: {first_line(error)}. {NEEDED}") from error
    vision = getattr(config, "vision_config", None)
    if not isinstance(vision, PretrainedConfig):
        vision = config
    if _find_class(vision) is None:
        raise ModelError(f"{name} is a {config.model_type}, which has no vision encoder. {NEEDED}")
    return vision


def config_from_dict(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration with these values; ``model_type`` tells its class.

    Raises:
        ModelError: this version of transformers does not know it, or it needs a package that is not installed.
    """
    try:
        return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    except (KeyError, ImportError) as error:
        raise ModelError(f"the vision encoder {values['model_type']} cannot be built: {first_line(error)}") from error


def model_class(config: PretrainedConfig) -> Any:
    """The class of the vision encoder with this configuration."""
    found = _find_class(config)
    assert found is not None
    return found


def _find_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    registered = MODEL_MAPPING.get(type(config), None)
    found: tuple[Any, ...] = registered if isinstance(registered, tuple) else (registered,)
    if registered is None:
        # A vision half that is registered with its whole model alone.
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        found = tuple(
            value
            for value in vars(modeling).values()
            if isinstance(value, type)
            and issubclass(value, PreTrainedModel)
            and value.config_class is type(config)
            and value.__name__.endswith(("VisionModel", "VisionTransformer"))
        )
    images = [value for value in found if value is not None and value.main_input_name == "pixel_values"]
    return images[0] if images else None


def attention(network: type[PreTrainedModel]) -> dict[str, str]:
    """The fastest attention that is always there, as an argument for loading."""
    return {"attn_implementation": "sdpa"} if network._supports_sdpa else {}


def side(size: Any) -> int | None:
    """A configuration's size of an image or patch, if it is square; None: it is not, or there is none."""
    if isinstance(size, int):
        return size
    return size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else None
