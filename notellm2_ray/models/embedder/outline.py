"""Embedders without weights, for a forecast of their memory (:mod:`notellm2_ray.models.footprint`)."""

from __future__ import annotations

from typing import Any

import torch

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.core.settings.train import LoraSettings
from notellm2_ray.models.embedder.kinds import adapted_module
from notellm2_ray.models.embedder.mllm_inputs import make_preprocessor as mllm_preprocessor
from notellm2_ray.models.embedder.mllm_network import MllmModel, network_from_config
from notellm2_ray.models.embedder.network import make_preprocessor, model_from_configs
from notellm2_ray.models.embedder.preprocess import NoteBatch
from notellm2_ray.models.embedder.variants import VARIANTS
from notellm2_ray.models.footprint import Outline
from notellm2_ray.models.llm import load_config, load_tokenizer, read_config
from notellm2_ray.models.lora import add_lora, store_frozen_linears_in_bf16
from notellm2_ray.models.processors import load_processor
from notellm2_ray.models.vision import families, openclip
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.models.vision.processors import load_image_settings


def embedder_outline(
    settings: ModelSettings, lora: LoraSettings | None, *, llm_path: str, vision_path: str, bf16: bool
) -> Outline:
    """The network of these settings as it is trained, whose samples are notes of the greatest length.

    Raises:
        ModelError: a configuration cannot be read, or the kind of embedder is of another package.
    """
    if settings.kind == "notellm2":
        network, run, layers = _notellm2(settings, llm_path, vision_path)
    elif settings.kind == "mllm":
        network, run, layers = _mllm(settings, llm_path)
    else:
        raise ModelError(f"model.kind={settings.kind} is of another package")

    def build() -> Any:
        made = network().train()
        if lora is not None:
            part = made.get_submodule(adapted_module(settings))
            add_lora(part, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, seed=0)
            if bf16:
                store_frozen_linears_in_bf16(part)
        return made

    return Outline(build, run, layers)


def _notellm2(settings: ModelSettings, llm_path: str, vision_path: str) -> tuple[Any, Any, int]:
    variant = VARIANTS[settings.variant]
    llm = None if variant.prompt is None else load_config(llm_path, settings.revision)
    vision, image = _tower(vision_path) if variant.sees_images else (None, None)
    tokens = 0
    if llm is not None:
        tokenizer = load_tokenizer(llm_path, settings.revision)
        llm.vocab_size = max(llm.vocab_size, len(tokenizer))  # with the two added tokens
        tokens = make_preprocessor(settings, tokenizer, None, llm).max_tokens
    side = image.size if image is not None else 0

    def build() -> Any:
        return model_from_configs(settings, llm, vision, image)

    def run(network: Any, count: int) -> Any:
        ids, rows = torch.zeros(count, tokens, dtype=torch.int64), torch.arange(count)
        pixels = torch.zeros(count if vision is not None else 0, 3, side, side, dtype=torch.uint8)
        images = rows if vision is not None else rows[:0]
        begins, ends = torch.zeros_like(images), torch.full_like(images, settings.qformer.num_queries)
        last = torch.full((count,), max(tokens - 1, 0))
        mask = torch.ones_like(ids)
        mask[:1, -1:] = 0  # without any padding attention would need no mask
        return network(NoteBatch(ids, mask, last, pixels, images, begins, ends))

    return build, run, llm.num_hidden_layers if llm is not None else (vision or {}).get("num_hidden_layers", 1)


def _tower(name: str) -> tuple[dict[str, Any], ImageSettings]:
    if name.startswith("openclip:"):
        import open_clip

        found = open_clip.get_model_config(name.split(":")[1])
        if found is None:
            raise ModelError(f"{name}: open_clip has no such architecture")
        config = openclip.vision_config(found, name)
        return config.to_dict(), ImageSettings(families.side(config.image_size) or 0)
    if name.startswith("timm:") or openclip.is_directory(name):
        raise ModelError(f"{name}: towers of timm and of OpenCLIP's own directories are not foretold")
    vision = families.load_vision_config(name)
    return vision.to_dict(), load_image_settings(name, vision)


def _mllm(settings: ModelSettings, llm_path: str) -> tuple[Any, Any, int]:
    config = read_config(llm_path, settings.revision, "")
    text = config.get_text_config(decoder=True)
    tokens = mllm_preprocessor(settings, load_processor(llm_path, settings.revision), config).max_tokens()

    def run(network: Any, count: int) -> Any:
        # The image encoder is left out: frozen, it keeps nothing for the backward pass.
        states = torch.zeros(count, tokens, text.hidden_size)
        out = network.mllm.get_decoder()(inputs_embeds=states, use_cache=False).last_hidden_state
        return network.projection(out[:, -1])

    return lambda: MllmModel(settings, network_from_config(config, settings.attention)), run, text.num_hidden_layers
