"""A random Qwen2-VL of two layers in Hugging Face layout, made in a moment, that vLLM runs; and images to show it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from notellm2_ray.core.recommend_prompts import PREFERENCE_TEMPLATES, SUMMARY_TEMPLATES
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.models.tiny.mllm_files import new_model, new_processor, new_tokenizer, save

SIZES = TinySettings(
    vocab_size=700,
    mllm_layers=2,
    mllm_hidden_size=64,
    mllm_heads=2,
    mllm_vision_layers=1,
    mllm_vision_hidden_size=32,
    mllm_vision_heads=2,
    mllm_image_side=56,
)


def save_mllm(directory: Path, *, answers: Literal["varied", "certain"] = "varied") -> str:
    """Save the model with its tokenizer, image processing and chat template; returns the directory.

    Args:
        answers: ``varied``: a text that wanders on; ``certain``: a probability that depends much on the prompt, and an
            answer that can be learned by heart.
    """
    tokenizer = new_tokenizer([*PREFERENCE_TEMPLATES.values(), *SUMMARY_TEMPLATES.values()] * 5, SIZES.vocab_size)
    torch.manual_seed(0)
    model = new_model(SIZES, tokenizer)
    if answers == "certain":
        model.model.language_model.norm.weight.data.mul_(6.0)
    else:
        for weight in model.parameters():
            weight.data.mul_(2.0)
    save(model, new_processor(tokenizer, SIZES.mllm_image_side), directory)
    return str(directory)


def picture(number: int, side: int = 56) -> bytes:
    """A small JPEG of its own colours."""
    pixels = np.random.default_rng(number).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()
