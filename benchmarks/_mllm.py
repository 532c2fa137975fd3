"""A Qwen2-VL of the demo's size and tokenizer, with random weights: as fast as the trained one, and made in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from notellm2_ray.core.recommend_prompts import PREFERENCE_TEMPLATES, SUMMARY_TEMPLATES
from notellm2_ray.core.settings import Settings
from notellm2_ray.presets import preset

SEED = 42
WORDS = ["red", "blue", "green", "small", "large", "cat", "sofa", "lamp", "garden", "travel", "food", "dress", "street"]


def save_random_mllm(directory: Path, **changes: Any) -> Path:
    """Save the model, with ``changes`` to the demo's tiny settings; the directory."""
    import torch

    from notellm2_ray.core.config import build
    from notellm2_ray.models.tiny.mllm_files import new_model, new_processor, new_tokenizer, save

    settings = build(Settings, preset("demo")).tiny.model_copy(update=changes)
    corpus = [*PREFERENCE_TEMPLATES.values(), *SUMMARY_TEMPLATES.values(), " ".join(WORDS)] * 20
    tokenizer = new_tokenizer(corpus, settings.vocab_size)
    torch.manual_seed(SEED)
    model = new_model(settings, tokenizer)
    for name, weight in model.named_parameters():
        if ".layers." in name:  # large enough that the answer does not just repeat the prompt's last token
            weight.data.mul_(4.0)
    save(model, new_processor(tokenizer, settings.mllm_image_side), directory)
    return directory
