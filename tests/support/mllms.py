"""Tiny random multimodal LLMs of several architectures, with the processors of their published checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

_QWEN_MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_LLAVA_MARKS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% endif %}"
    "{% endfor %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WIDTH = 64
_TEXT: dict[str, Any] = dict(
    hidden_size=WIDTH,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.1,
)
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}}
_CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=16,
    initializer_range=0.1,
)
_TILES = [[28, 56], [56, 28], [56, 56]]


def _tokenizer(marks: tuple[str, ...], **special: str) -> PreTrainedTokenizerFast:
    """A token for every byte. Nothing merges, so texts can be tokenised in pieces or as a whole."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    made.add_tokens(list(marks), special_tokens=True)
    return made


def _qwen(text: dict[str, Any], vision: dict[str, Any], config: Any, model: Any, processor: Any, patch: int) -> Any:
    tokenizer = _tokenizer(_QWEN_MARKS, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    ids = tokenizer.get_vocab()
    marks = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text = {**_TEXT, **_MROPE, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 0, **text}
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 784, "max_pixels": 50_000}
    video = Qwen3VLVideoProcessor if patch == 16 else Qwen2VLVideoProcessor
    return (
        model(config(text_config=text, vision_config=vision, tie_word_embeddings=False, **marks)),
        processor(Qwen2VLImageProcessor(**sizes), tokenizer, video(**sizes), chat_template=QWEN_TEMPLATE),
    )


def _qwen2_vl() -> Any:
    vision = dict(depth=2, embed_dim=32, hidden_size=WIDTH, num_heads=2, patch_size=14, initializer_range=0.1)
    return _qwen({}, vision, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, 14)


def _qwen2_5_vl() -> Any:
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=14,
        out_hidden_size=WIDTH,
        fullatt_block_indexes=[1],
        initializer_range=0.1,
    )
    return _qwen({}, vision, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, 14)


def _qwen3_vl() -> Any:
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=16,
        out_hidden_size=WIDTH,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
        initializer_range=0.1,
    )
    text = {"head_dim": 32}
    return _qwen(text, vision, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, 16)


def _llava_parts() -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    tokenizer = _tokenizer(_LLAVA_MARKS, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    from tokenizers.processors import TemplateProcessing

    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    text = {**_TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    return tokenizer, dict(
        text_config=text, vision_config=_CLIP, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )


def _llava() -> Any:
    tokenizer, config = _llava_parts()
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return LlavaForConditionalGeneration(LlavaConfig(**config)), processor


def _llava_next() -> Any:
    tokenizer, config = _llava_parts()
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(image_grid_pinpoints=_TILES, **sizes),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=_TILES, **config)), processor


def _blip_2() -> Any:
    tokenizer = _tokenizer(("<pad>", "</s>"), pad_token="<pad>", bos_token="</s>", eos_token="</s>")
    size = {"height": 28, "width": 28}
    processor = Blip2Processor(BlipImageProcessor(size=size), tokenizer, num_query_tokens=4)
    text = dict(
        model_type="opt",
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        vocab_size=len(tokenizer),
        init_std=0.1,
        dropout=0.0,
    )
    qformer = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    vision = {name: value for name, value in _CLIP.items() if name not in ("model_type", "projection_dim")}
    config = Blip2Config(
        text_config=text,
        qformer_config=qformer,
        vision_config=vision,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return model, processor


KINDS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "llava_next": _llava_next,
    "blip_2": _blip_2,
}


def save(kind: str, directory: Path) -> str:
    """A multimodal LLM of one of ``KINDS`` with its processor; returns the directory."""
    torch.manual_seed(0)
    model, processor = KINDS[kind]()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)
