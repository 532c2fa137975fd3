"""Loads a pretrained tower by the name that ``model.vision`` has."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.core.settings.model import VisionPooling
from notellm2_ray.models.llm import require_all_weights
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.vision import families, openclip, timm_models
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.models.vision.processors import load_image_settings
from notellm2_ray.models.vision.proof import check_sizes, check_tower, unused_parameters
from notellm2_ray.models.vision.tower import VisionTower, drop_head

_PROJECTION = "visual_projection.weight"
# Where whole models keep their vision half.
_INSIDE = re.compile(r"^(model\.)?(vision_model|vision_tower|visual)\.")


class _Loaded(NamedTuple):
    model: PreTrainedModel
    image: ImageSettings
    projection: torch.Tensor | None = None  # (h_p, h_v)
    missing: frozenset[str] = frozenset()  # weights that the checkpoint lacks


@quiet_loading()
def load_tower(
    name: str, *, frozen: bool, pooling: VisionPooling | None = "auto", dtype: torch.dtype = torch.float32
) -> VisionTower:
    """The pretrained tower called ``name`` in the settings.

    Args:
        name: directory or hub name of a vision encoder, or of a model that has one; directory of an OpenCLIP;
            ``openclip:ARCHITECTURE[:PRETRAINED]``; ``timm:ARCHITECTURE[:PRETRAINED]``.
        pooling: how the pooled vector is made; None: nothing uses it.

    Raises:
        ModelError: the model does not exist, lacks weights, or gives no states of square patches.
    """
    if name.startswith("openclip:") or openclip.is_directory(name):
        loaded = _Loaded(*openclip.load(name))
    elif name.startswith(timm_models.PREFIX):
        parts = timm_models.parse(name)
        if parts.weights is None:
            loaded = _hugging_face(timm_models.hub_name(parts), dtype, pooling)
        else:
            loaded = _Loaded(*timm_models.load(parts))
    else:
        loaded = _hugging_face(name, dtype, pooling)
    check_sizes(loaded.model.config, name)
    model: Any = loaded.model.to(dtype=dtype)  # type: ignore[call-arg]
    projection = _linear(loaded.projection, dtype) if pooling == "projected" else None
    tower = VisionTower(model, loaded.image, frozen=False, pooling=pooling, projection=projection)
    check_tower(tower, name)
    unused = set(unused_parameters(tower)) if loaded.missing or not frozen else set()
    require_all_weights({"missing_keys": [key for key in loaded.missing if f"model.{key}" not in unused]}, name)
    for key, parameter in tower.named_parameters():
        parameter.requires_grad_(not frozen and key not in unused)
    tower.frozen = frozen
    return tower.train(not frozen)


def _hugging_face(name: str, dtype: torch.dtype, pooling: VisionPooling | None) -> _Loaded:
    config = families.load_vision_config(name)
    network = families.model_class(config)
    model, missing = _read(name, config, network, dtype)
    if missing and all(_INSIDE.match(key) is None for key in missing):
        inside, left = _read(name, config, network, dtype, key_mapping={_INSIDE.pattern: ""})
        model, missing = (inside, left) if len(left) < len(missing) else (model, missing)
    if missing and all(key.startswith("pooler.") for key in missing):
        drop_head(model)  # the checkpoint is of a task without it, such as classification
        missing = frozenset()
    if hasattr(model, "timm_model"):
        timm_models.complete(model.config, model.timm_model)
    projection = _projection(name) if pooling == "projected" else None
    return _Loaded(model, load_image_settings(name, config), projection, missing)


def _read(
    name: str, config: PretrainedConfig, network: Any, dtype: torch.dtype, **how: Any
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The network with its weights, and the names of those that the checkpoint lacks."""
    how |= families.attention(network)
    try:
        model, report = network.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"the weights of {name} cannot be loaded: {first_line(error)}") from error
    require_all_weights({"missing_keys": [], "mismatched_keys": report.get("mismatched_keys", ())}, name)
    return model, frozenset(report["missing_keys"])


def _projection(name: str) -> torch.Tensor | None:
    """The projection that a CLIP has beside its vision half, if the checkpoint has one."""
    from safetensors import safe_open
    from transformers.utils.hub import get_checkpoint_shard_files

    single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    files = [single] if single else get_checkpoint_shard_files(name, index)[0] if index else []
    for file in files:
        with safe_open(file, "pt") as weights:
            if _PROJECTION in weights.keys():  # noqa: SIM118 (it is no dictionary)
                return weights.get_tensor(_PROJECTION)
    return None


def _linear(weight: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear | None:
    if weight is None:
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.to(dtype)
    return linear
