"""timm's models as towers, by ``timm:ARCHITECTURE[:PRETRAINED]``: transformers wraps them, so they are like all others.

A saved embedder names the architecture and holds the weights. To load it, the package timm is needed, but no hub.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.models.vision.processors import from_timm

PREFIX = "timm:"


class TimmName(NamedTuple):
    """A timm model by name."""

    architecture: str
    tag: str  # of its published weights; empty: timm's default
    weights: Path | None  # a .safetensors file instead


def parse(name: str) -> TimmName:
    """The parts of ``timm:ARCHITECTURE[:PRETRAINED]``.

    Raises:
        ModelError: timm is not installed, or has no such architecture or weights.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError("timm:... needs the package timm: pip install timm") from error
    architecture, _, pretrained = name.removeprefix(PREFIX).partition(":")
    if not timm.is_model(architecture):
        raise ModelError(f"timm has no architecture {architecture!r}; `timm.list_models()` lists them")
    if Path(pretrained).suffix == ".safetensors":
        return TimmName(architecture, "", Path(pretrained))
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*") or [architecture]]
    tags = [tag for tag in tags if tag]
    if pretrained not in ("", *tags) or not tags:
        raise ModelError(
            f"{name}: choose one of its weights ({', '.join(tags) or 'there are none'}), or a .safetensors file"
        )
    return TimmName(architecture, pretrained, None)


def hub_name(parts: TimmName) -> str:
    """The hub name of a model's published weights.

    Raises:
        ModelError: they are not on the hub.
    """
    import timm

    full = f"{parts.architecture}.{parts.tag}" if parts.tag else parts.architecture
    published = timm.get_pretrained_cfg(full, allow_unregistered=False)
    if published is None or not published.hf_hub_id:
        raise ModelError(f"{PREFIX}{full}: its weights are not on the Hugging Face hub; give a .safetensors file")
    if published.hf_hub_id.endswith("/"):
        return f"{published.hf_hub_id}{parts.architecture}.{published.tag}"
    return published.hf_hub_id


def load(parts: TimmName) -> tuple[PreTrainedModel, ImageSettings]:
    """The model with the weights of a file, which has timm's own names, with or without a classifier.

    Raises:
        ModelError: the file is missing, or does not fit the architecture.
    """
    import timm
    from safetensors.torch import load_file
    from transformers import TimmWrapperConfig, TimmWrapperModel

    where, weights = f"{PREFIX}{parts.architecture}", parts.weights
    assert weights is not None
    if not weights.is_file():
        raise ModelError(f"{where}: {weights} does not exist")
    config = TimmWrapperConfig(architecture=parts.architecture)
    model = TimmWrapperModel(config)
    inner: Any = model.timm_model
    complete(config, inner)
    # What timm does with published weights of its own, such as renaming those of another source.
    adapt = getattr(sys.modules[type(inner).__module__], "checkpoint_filter_fn", lambda state, _: state)
    try:
        missing, _ = inner.load_state_dict(adapt(load_file(weights), inner), strict=False)
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"{where}: {weights} does not fit its architecture: {first_line(error)}") from error
    if missing:
        raise ModelError(f"{where}: {weights} does not fit its architecture; missing {missing[:3]}")
    return model, from_timm(timm.data.resolve_data_config(model=inner), where)


def complete(config: PretrainedConfig, inner: Any) -> None:
    """Write into a wrapper's configuration what timm tells only by the model: its width, patches and class tokens."""
    patches: Any = getattr(inner, "patch_embed", None)
    config.hidden_size = inner.num_features
    config.patch_size = list(patches.patch_size) if hasattr(patches, "patch_size") else None
    config.num_cls_tokens = getattr(inner, "num_prefix_tokens", 0)
    config.label_names = []  # a thousand names of classes
