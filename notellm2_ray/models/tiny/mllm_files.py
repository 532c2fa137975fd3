"""A new Qwen2-VL with tokenizer, image processor and chat template: all that a Hugging Face directory holds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.recommend_prompts import NO, YES
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.models.tiny.llm import train_tokenizer

PATCH, MERGE = 14, 2  # as in Qwen2-VL; one token stands for 28 x 28 pixels
SHORT_ANSWERS = (YES, NO, "是", "否")  # each is a single token
MAX_POSITIONS = 4096
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Standard deviation of the initial weights. With the usual 0.02, attention in so narrow a model starts out uniform and
# training is slow to change that.
_INITIAL_DEVIATION = 0.06
_ROLES = ("system", "user", "assistant")
_MARKS = (PAD, START, END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{ part.text }}
{%- elif part.type in ('image', 'image_url') -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def new_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the corpus, with Qwen2-VL's special tokens; each of ``SHORT_ANSWERS`` is one token.

    Raises:
        ModelError: the vocabulary is too small for that.
    """
    # Repeated so often that they are merged before any word of the corpus.
    often = chain.from_iterable((*SHORT_ANSWERS, *_ROLES) for _ in range(20_000))
    tokenizer = train_tokenizer(
        chain(often, corpus),
        vocab_size,
        _MARKS,
        pad_token=PAD,
        eos_token=END,
        bos_token=None,
    )
    for answer in SHORT_ANSWERS:
        if len(tokenizer(answer).input_ids) != 1:
            raise ModelError(f"tiny.vocab_size={vocab_size} is too small: {answer!r} is not a single token. Raise it.")
    tokenizer.model_max_length = MAX_POSITIONS
    return tokenizer


def new_processor(tokenizer: PreTrainedTokenizerBase, side: int) -> Qwen2VLProcessor:
    """A processor that gives a picture at least four tokens, and at most those of a square of ``side`` pixels."""
    # One pixel to spare: the library divides and rounds down, so that a rounding error could turn three tokens a side
    # into two.
    area = {"min_pixels": (min(2 * PATCH * MERGE, side) - 1) ** 2, "max_pixels": (side + 1) ** 2}
    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, **area}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=_CHAT_TEMPLATE,
    )


def new_model(settings: TinySettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLForConditionalGeneration:
    """The model, with weights drawn from torch's global random state."""
    # On a CPU, plain attention is faster than fused attention at these lengths and widths.
    model = Qwen2VLForConditionalGeneration._from_config(_config(settings, tokenizer), attn_implementation="eager")
    _attend_to_like_tokens(model)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


@torch.no_grad()
def _attend_to_like_tokens(model: Qwen2VLForConditionalGeneration) -> None:
    """Set the initial weights such that every token attends to tokens like itself and copies them.

    Most exercises ask the model to find something in the prompt by its name. With independent queries and keys, a model
    of this size does not learn that within the whole training; with equal ones it starts from there (Trockman & Kolter,
    Mimetic Initialization of Self-Attention Layers, 2023).
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(1.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(2 * attention.v_proj.weight.T)


def save(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, directory: Path) -> None:
    """Write everything that is needed to load the model."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _config(settings: TinySettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLConfig:
    width, heads = settings.mllm_hidden_size, settings.mllm_heads
    half = width // heads // 2  # of a head; the three kinds of position share it
    across = (half * 3) // 8
    marks = {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": settings.mllm_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [half - 2 * across, across, across],
        },
        "tie_word_embeddings": True,
        "initializer_range": _INITIAL_DEVIATION,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": settings.mllm_vision_layers,
        "embed_dim": settings.mllm_vision_hidden_size,
        "hidden_size": width,
        "num_heads": settings.mllm_vision_heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "initializer_range": _INITIAL_DEVIATION,
    }
    ids: dict[str, Any] = {name: tokenizer.get_vocab()[mark] for name, mark in marks.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
