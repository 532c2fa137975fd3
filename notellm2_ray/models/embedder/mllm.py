"""A ready multimodal LLM as embedder (Tables 2 and 10: BLIP-2, LLaVA, Qwen-VL): its row in the table of kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.embedder.kinds import EmbedderKind

if TYPE_CHECKING:
    from notellm2_ray.models.embedder.mllm_inputs import MllmPreprocessor
    from notellm2_ray.models.embedder.mllm_network import MllmModel


def _build(
    settings: ModelSettings, seed: int, llm_path: str, vision_path: str, precision: str
) -> tuple[MllmModel, MllmPreprocessor]:
    """Load the network and its processor; the projection, if there is one, is initialised randomly."""
    import torch

    from notellm2_ray.models.chat import load_processor
    from notellm2_ray.models.embedder.mllm_inputs import make_preprocessor
    from notellm2_ray.models.embedder.mllm_network import MllmModel, load_network
    from notellm2_ray.models.embedder.random_stream import random_stream

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = load_network(llm_path, settings.attention, dtype, settings.revision)
    preprocessor = make_preprocessor(settings, load_processor(llm_path, settings.revision), network.config)
    with random_stream(seed, "connector, fusion and projection"):
        return MllmModel(settings, network), preprocessor


def _config(model: MllmModel) -> dict[str, Any]:
    return {"mllm_config": model.mllm.config.to_dict()}


def _describe(model: MllmModel, preprocessor: MllmPreprocessor, directory: Path) -> None:
    preprocessor.processor.save_pretrained(directory)


def _load(
    settings: ModelSettings, values: Mapping[str, Any], directory: Path, attention: str | None
) -> tuple[MllmModel, MllmPreprocessor]:
    from transformers import CONFIG_MAPPING

    from notellm2_ray.models.chat import load_processor
    from notellm2_ray.models.embedder.mllm_inputs import make_preprocessor
    from notellm2_ray.models.embedder.mllm_network import MllmModel, network_from_config

    config = CONFIG_MAPPING[values["mllm_config"]["model_type"]].from_dict(dict(values["mllm_config"]))
    model = MllmModel(settings, network_from_config(config, attention or settings.attention))
    return model, make_preprocessor(settings, load_processor(str(directory)), config)


KIND = EmbedderKind(
    build=_build,
    config=_config,
    describe=_describe,
    load=_load,
    parts=lambda settings: ("llm",),
    natural_inputs=lambda settings: "multimodal",
    packaged_llm="mllm",
    adapted=lambda settings: "mllm",
)
