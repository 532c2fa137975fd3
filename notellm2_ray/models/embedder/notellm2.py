"""The embedder of NoteLLM-2 and its variants: its row in the table of kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.embedder.kinds import EmbedderKind, Inputs
from notellm2_ray.models.embedder.variants import VARIANTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from notellm2_ray.models.embedder.mlrm import NoteModel
    from notellm2_ray.models.embedder.preprocess import NotePreprocessor
    from notellm2_ray.models.vision.pixels import ImageSettings


def _build(
    settings: ModelSettings, seed: int, llm_path: str, vision_path: str, precision: str
) -> tuple[NoteModel, NotePreprocessor]:
    """Load the LLM and the tower, and initialise the other parts randomly. The tokenizer is always the LLM's."""
    import torch

    from notellm2_ray.models import llm as llms
    from notellm2_ray.models.embedder.mlrm import NoteModel
    from notellm2_ray.models.embedder.network import freezes_vision, make_preprocessor, pooling_of
    from notellm2_ray.models.embedder.random_stream import random_stream
    from notellm2_ray.models.vision.load import load_tower

    variant = VARIANTS[settings.variant]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokenizer = llms.load_tokenizer(llm_path, settings.revision)
    llm = tower = None
    if variant.prompt is not None:
        llm = llms.load_llm(llm_path, settings.attention, dtype, settings.revision)
        llms.embed_added_tokens(llm, tokenizer)
    if variant.sees_images:
        tower = load_tower(vision_path, frozen=freezes_vision(settings), pooling=pooling_of(settings), dtype=dtype)
    with random_stream(seed, "connector, fusion and projection"):
        model = NoteModel(settings, llm, tower)
    return model, make_preprocessor(settings, tokenizer, tower, llm.config if llm is not None else None)


def _describe(model: NoteModel, preprocessor: NotePreprocessor, directory: Path) -> None:
    preprocessor.tokenizer.save_pretrained(directory)
    if preprocessor.image is not None:
        preprocessor.image.save(directory)


def _config(model: NoteModel) -> dict[str, Any]:
    """The configurations of LLM and tower, for config.json."""
    return {
        "llm_config": model.llm.config.to_dict() if model.llm is not None else None,
        "vision_config": model.tower.describe() if model.tower is not None else None,
    }


def _load(
    settings: ModelSettings, values: Mapping[str, Any], directory: Path, attention: str | None
) -> tuple[NoteModel, NotePreprocessor]:
    from notellm2_ray.models.embedder.network import make_preprocessor, model_from_configs
    from notellm2_ray.models.llm import load_tokenizer

    llm_config, vision_config = _llm_config(values["llm_config"]), values["vision_config"]
    image = _read_image(directory, vision_config)
    model = model_from_configs(settings, llm_config, vision_config, image, attention=attention)
    return model, make_preprocessor(settings, load_tokenizer(str(directory)), model.tower, llm_config)


def _llm_config(values: Mapping[str, Any] | None) -> PretrainedConfig | None:
    from transformers import CONFIG_MAPPING

    return None if values is None else CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))


def _read_image(directory: Path, vision_config: Mapping[str, Any] | None) -> ImageSettings | None:
    from notellm2_ray.models.vision.pixels import PREPROCESSOR_FILE, from_processor

    if vision_config is None:
        return None
    try:
        values = json.loads((directory / PREPROCESSOR_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / PREPROCESSOR_FILE} cannot be read: {error}") from error
    return from_processor(values, values["crop_size"]["height"], str(directory))


def _parts(settings: ModelSettings) -> tuple[str, ...]:
    """Every variant needs the LLM, at least for its tokenizer."""
    return ("llm", "vision") if VARIANTS[settings.variant].sees_images else ("llm",)


def _natural_inputs(settings: ModelSettings) -> Inputs:
    variant = VARIANTS[settings.variant]
    return "image" if variant.prompt is None else "multimodal" if variant.sees_images else "text"


def _adapted(settings: ModelSettings) -> str | None:
    return None if VARIANTS[settings.variant].prompt is None else "llm"


KIND = EmbedderKind(
    build=_build,
    describe=_describe,
    load=_load,
    parts=_parts,
    natural_inputs=_natural_inputs,
    config=_config,
    adapted=_adapted,
)
