"""Converts OpenCLIP towers to Hugging Face's CLIP, which is the same network with other names.

So a trained embedder can be loaded without the open_clip package, and all towers share one code path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.vision.pixels import CLIP_MEAN, CLIP_STD, ImageSettings

_CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"
# Options that Hugging Face's CLIP lacks. A vision_cfg with another value for one of them is a different network.
_PLAIN = {
    "timm_model_name": None,
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}


def is_directory(name: str) -> bool:
    """Whether ``name`` is a local directory in OpenCLIP's own format."""
    return (Path(name) / _CONFIG).is_file()


def load(name: str) -> tuple[CLIPVisionModel, ImageSettings, torch.Tensor | None]:
    """The tower of a local OpenCLIP directory, or of ``openclip:ARCHITECTURE[:PRETRAINED]``.

    Returns:
        the tower, its image format and its projection (h_p, h_v) into the space that it shares with texts.

    Raises:
        ModelError: it is unknown, not a plain vision transformer, or has no safetensors weights.
    """
    if name.startswith("openclip:"):
        return _load_named(*name.removeprefix("openclip:").partition(":")[::2])
    directory = Path(name)
    try:
        values = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        model_config, preprocess = values["model_cfg"], values.get("preprocess_cfg", {})
    except (ValueError, KeyError) as error:
        raise ModelError(f"{directory / _CONFIG} is damaged: {error}") from error
    return _load(model_config, preprocess, directory / _WEIGHTS, str(directory))


def _load_named(architecture: str, pretrained: str) -> tuple[CLIPVisionModel, ImageSettings, torch.Tensor | None]:
    try:
        import open_clip
    except ImportError as error:
        raise ModelError("openclip:... needs the package open_clip_torch: pip install open_clip_torch") from error
    model_config = open_clip.get_model_config(architecture)
    if model_config is None:
        raise ModelError(f"OpenCLIP has no architecture {architecture!r}; `open_clip.list_models()` lists them")
    if Path(pretrained).suffix == ".safetensors":
        return _load(model_config, {}, Path(pretrained), f"openclip:{architecture}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not pretrained and len(tags) == 1:
        pretrained = tags[0]
    if pretrained not in tags:
        raise ModelError(
            f"openclip:{architecture}:{pretrained}: choose one of its weights ({', '.join(tags) or 'there are none'}), "
            "or a .safetensors file"
        )
    source = open_clip.get_pretrained_cfg(architecture, pretrained)
    try:
        weights = Path(open_clip.download_pretrained(source, prefer_hf_hub=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"openclip:{architecture}:{pretrained} cannot be downloaded: {error}") from error
    model_config = {**model_config, "quick_gelu": model_config.get("quick_gelu", source.get("quick_gelu", False))}
    return _load(model_config, source, weights, f"openclip:{architecture}:{pretrained}")


def _load(
    model_config: Mapping[str, Any], preprocess: Mapping[str, Any], weights: Path, where: str
) -> tuple[CLIPVisionModel, ImageSettings, torch.Tensor | None]:
    from safetensors.torch import load_file

    config = vision_config(model_config, where)
    if weights.suffix != ".safetensors":
        raise ModelError(f"{where}: its weights are pickled ({weights.name}), but only safetensors are read")
    if not weights.is_file():
        raise ModelError(f"{where}: {weights} does not exist")
    visual = {key[len("visual.") :]: value for key, value in load_file(weights).items() if key.startswith("visual.")}
    model = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
    projection = visual.pop("proj", None)
    missing, unexpected = model.load_state_dict(_renamed(visual, model), strict=False)
    if missing or unexpected:
        raise ModelError(
            f"{where}: {weights} does not fit its architecture; missing {missing[:3]}, not expected {unexpected[:3]}"
        )
    image = image_settings(preprocess, config.image_size, where)  # type: ignore[arg-type]
    return model, image, None if projection is None else projection.T.contiguous()


def vision_config(model_config: Mapping[str, Any], where: str) -> CLIPVisionConfig:
    """OpenCLIP's ``vision_cfg`` as a Hugging Face CLIP configuration.

    Raises:
        ModelError: the tower is not a plain vision transformer.
    """
    vision = dict(model_config["vision_cfg"])
    unlike = [key for key, plain in _PLAIN.items() if vision.get(key, plain) != plain]
    if unlike or not isinstance(vision.get("layers", 12), int) or not isinstance(vision.get("image_size", 224), int):
        raise ModelError(
            f"{where}: its tower is no plain vision transformer ({', '.join(unlike) or 'ResNet or not square'}); "
            "use the model's Hugging Face version if it has one (SigLIP has)"
        )
    width = vision.get("width", 768)
    return CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=vision.get("layers", 12),
        num_attention_heads=width // vision.get("head_width", 64),
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        patch_size=vision.get("patch_size", 16),
        image_size=vision.get("image_size", 224),
        hidden_act="quick_gelu" if model_config.get("quick_gelu") else "gelu",
        layer_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        projection_dim=model_config.get("embed_dim", 512),
    )


def image_settings(preprocess: Mapping[str, Any], size: int, where: str) -> ImageSettings:
    """Image settings from OpenCLIP's ``preprocess_cfg``."""
    mode = preprocess.get("resize_mode", "shortest")
    if mode == "longest":
        raise ModelError(f"{where}: resize_mode 'longest' pads images, which is not supported; set it to 'shortest'")
    filters = {"bicubic": 3, "bilinear": 2}
    return ImageSettings(
        size,
        tuple(preprocess.get("mean", CLIP_MEAN)),
        tuple(preprocess.get("std", CLIP_STD)),
        resize=mode,
        resample=filters.get(preprocess.get("interpolation", "bicubic"), 3),
    )


def _renamed(visual: Mapping[str, torch.Tensor], model: CLIPVisionModel) -> dict[str, torch.Tensor]:
    """OpenCLIP's ``visual.*`` weights under the names of ``model``."""
    outer = "vision_model." if hasattr(model, "vision_model") else ""
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    renamed: dict[str, torch.Tensor] = {}
    for key, value in visual.items():
        if key in names:
            renamed[outer + names[key]] = value
        elif key.startswith(("ln_pre.", "ln_post.")):
            renamed[outer + key.replace("ln_pre", "pre_layrnorm").replace("ln_post", "post_layernorm")] = value
        elif key.startswith("transformer.resblocks."):
            _, _, layer, part = key.split(".", 3)
            target = f"{outer}encoder.layers.{layer}."
            part, _, leaf = part.rpartition(".")
            if part == "attn":  # in_proj_weight and in_proj_bias are q, k and v stacked
                for name, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                    renamed[f"{target}self_attn.{name}.{leaf.removeprefix('in_proj_')}"] = third
            else:
                part = "self_attn.out_proj" if part == "attn.out_proj" else parts.get(part, part)
                renamed[f"{target}{part}.{leaf}"] = value
        else:
            renamed[key] = value  # reported as not expected
    return renamed
