"""Image-text models of ten architectures: small random weights under the published names, processors, chat templates.

``save(kind, directory)`` writes a Hugging Face directory like those on the hub, without one. Attention heads have 32
dimensions, the least that vLLM's CPU kernels take. An image has few tokens, unless ``published`` sizes are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tests.support import chat_templates, tiny_tokenizers

POSITIONS = 8192
_WIDTH, _HEADS = 64, 2
_DEVIATION = 0.1  # of initial weights; with 0.02 so narrow a model says the same to everything


class Architecture(NamedTuple):
    """How one kind is made: of words and, for an image, the pixels of the side that its tower sees."""

    words: Callable[[], Any]
    config: Callable[[Any, int], Any]
    processor: Callable[[Any, int], Any]
    side: int  # small
    published: int


def save(kind: str, directory: Path, *, published: bool = False, weights: bool = True, names: str = "published") -> str:
    """Write a model of one of :data:`ARCHITECTURES`; returns the directory.

    Args:
        published: image processing in its published size; for the weights only the table of positions grows.
        weights: False: write configuration, tokenizer and processor alone.
        names: of the weights; ``transformers 5``: as that library writes a model that it did not load.
    """
    made = ARCHITECTURES[kind]
    side = made.published if published else made.side
    words = made.words()
    config = made.config(words, side)
    made.processor(words, side).save_pretrained(directory)
    config.architectures = [hf.AutoModelForImageTextToText._model_mapping[type(config)].__name__]
    if not weights:
        config.save_pretrained(directory)
        return str(directory)
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # some begin as zeros, and an image would not count
            if weight.dim() > 1 and not weight.any():
                weight.normal_(0, _DEVIATION)
    model.generation_config = hf.GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(directory)
    if names == "published":
        _publish(Path(directory) / "model.safetensors")
    return str(directory)


def _publish(file: Path) -> None:
    """Give the towers of CLIP and SigLIP the names that published checkpoints use."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for name in list(weights):
        tower, _, rest = name.partition("vision_tower.")
        if rest.startswith(("embeddings.", "encoder.", "pre_layrnorm", "post_layernorm")) and _is_clip(weights):
            weights[f"{tower}vision_tower.vision_model.{rest}"] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})


def _is_clip(weights: Mapping[str, Any]) -> bool:
    return any("vision_tower." in name and ".self_attn.out_proj." in name for name in weights)


def _text(words: Any, **more: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": len(words),
        "hidden_size": _WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1,
        "head_dim": _WIDTH // _HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": _DEVIATION,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return {**sizes, **more}


def _tower(side: int, patch: int = 14, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": _WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": _HEADS}
    return {**sizes, "image_size": side, "patch_size": patch, "initializer_range": _DEVIATION, **more}


def _id(words: Any, token: str) -> int:
    return int(words.convert_tokens_to_ids(token))


# Qwen
_VISION = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
_QWEN = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", **_VISION}
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}


def _qwen_words() -> Any:
    made = tiny_tokenizers.qwen([*_CHATML, *_QWEN.values()], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_tokens(["<think>", "</think>"])  # as in Qwen3: no special tokens
    return made


def _qwen_config(words: Any, kind: Any, patch: int, text: dict[str, Any], **vision: Any) -> Any:
    ids = {name: _id(words, token) for name, token in _QWEN.items()}
    sizes = {"depth": 2, "num_heads": _HEADS, "patch_size": patch, "initializer_range": _DEVIATION, **vision}
    return kind(text_config=_text(words, **text), vision_config=sizes, tie_word_embeddings=False, **ids)


def _qwen2_vl(words: Any, side: int) -> Any:
    vision = {"embed_dim": _WIDTH, "hidden_size": _WIDTH, "mlp_ratio": 2}
    return _qwen_config(words, hf.Qwen2VLConfig, 14, {"rope_parameters": _MROPE}, **vision)


def _qwen2_5_vl(words: Any, side: int) -> Any:
    vision = {"hidden_size": _WIDTH, "out_hidden_size": _WIDTH, "intermediate_size": 96, "fullatt_block_indexes": [1]}
    return _qwen_config(words, hf.Qwen2_5_VLConfig, 14, {"rope_parameters": _MROPE}, **vision)


def _qwen3_vl(words: Any, side: int) -> Any:
    vision: dict[str, Any] = {
        "hidden_size": _WIDTH,
        "out_hidden_size": _WIDTH,
        "intermediate_size": 96,
        "deepstack_visual_indexes": [0],
    }
    text = {"rope_parameters": {**_MROPE, "mrope_interleaved": True}}
    return _qwen_config(words, hf.Qwen3VLConfig, 16, text, num_position_embeddings=256, **vision)


def _qwen_processor(template: str, version: int) -> Callable[[Any, int], Any]:
    def make(words: Any, side: int) -> Any:
        kind = {2: hf.Qwen2VLProcessor, 25: hf.Qwen2_5_VLProcessor, 3: hf.Qwen3VLProcessor}[version]
        video: Any = Qwen3VLVideoProcessor if version == 3 else Qwen2VLVideoProcessor
        patch = 16 if version == 3 else 14
        sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
        pixels = {"min_pixels": (4 * patch) ** 2, "max_pixels": side**2}
        images = hf.Qwen2VLImageProcessor(**sizes, **pixels)
        return kind(images, words, video_processor=video(**sizes), chat_template=template)

    return make


# LLaVA, LLaVA-NeXT, Pixtral
_LLAVA_PROCESSING = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": "<image>",
}


def _llava_words() -> Any:
    return tiny_tokenizers.llama(["<image>"])


def _llava_parts(words: Any, side: int) -> dict[str, Any]:
    vision = hf.CLIPVisionConfig(**_tower(side, projection_dim=32))
    text = hf.LlamaConfig(**_text(words))
    return {"text_config": text, "vision_config": vision, "image_token_index": _id(words, "<image>")}


def _llava(words: Any, side: int) -> Any:
    parts = _llava_parts(words, side)
    return hf.LlavaConfig(**parts, image_seq_length=(side // 14) ** 2, vision_feature_layer=-2)


def _llava_processor(words: Any, side: int) -> Any:
    images = hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return hf.LlavaProcessor(images, words, chat_template=chat_templates.LLAVA, **_LLAVA_PROCESSING)


def _grids(side: int) -> list[list[int]]:
    return [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _llava_next(words: Any, side: int) -> Any:
    parts = _llava_parts(words, side)
    return hf.LlavaNextConfig(**parts, image_grid_pinpoints=_grids(side), vision_feature_layer=-2)


def _llava_next_processor(words: Any, side: int) -> Any:
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = hf.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=_grids(side))
    return hf.LlavaNextProcessor(images, words, chat_template=chat_templates.LLAVA_NEXT, **_LLAVA_PROCESSING)


_PIXTRAL = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _pixtral_words() -> Any:
    marks = ("<unk>", "<s>", "</s>", *_PIXTRAL)
    return tiny_tokenizers.byte_level(marks, "<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>")


def _pixtral(words: Any, side: int) -> Any:
    vision = hf.PixtralVisionConfig(**_tower(side, 16))
    text = hf.MistralConfig(**_text(words), sliding_window=None)
    features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=_id(words, "[IMG]"), **features)


def _pixtral_processor(words: Any, side: int) -> Any:
    images = hf.PixtralImageProcessor(size={"longest_edge": side}, patch_size={"height": 16, "width": 16})
    return hf.PixtralProcessor(images, words, patch_size=16, chat_template=chat_templates.PIXTRAL)


# InternVL
_INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def _internvl_words() -> Any:
    marks = [*_CHATML, *_INTERN.values()]
    return tiny_tokenizers.qwen(marks, _INTERN, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _internvl(words: Any, side: int) -> Any:
    vision = hf.InternVLVisionConfig(**_tower(side), use_absolute_position_embeddings=True)
    text = hf.Qwen2Config(**_text(words))
    image = {"image_token_id": _id(words, "<IMG_CONTEXT>"), "image_seq_length": (side // 28) ** 2}
    return hf.InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **image)


def _internvl_processor(words: Any, side: int) -> Any:
    size = {"height": side, "width": side}
    images = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
    video, template = InternVLVideoProcessor(size=size), chat_templates.INTERNVL
    return hf.InternVLProcessor(images, words, video, image_seq_length=(side // 28) ** 2, chat_template=template)


# Idefics3 (SmolVLM's frame is the same)
def _idefics3_words() -> Any:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    image = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", *image, *tiles)
    return tiny_tokenizers.byte_level(marks, "<|begin_of_text|>", eos_token="<end_of_utterance>", pad_token="<|pad|>")


def _idefics3(words: Any, side: int) -> Any:
    vision = {name: value for name, value in _tower(side).items()}
    text = {**_text(words), "model_type": "llama"}
    ids = {"image_token_id": _id(words, "<image>"), "pad_token_id": words.pad_token_id}
    return hf.Idefics3Config(vision_config=vision, text_config=text, scale_factor=2, **ids)


def _idefics3_processor(words: Any, side: int) -> Any:
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})
    tokens = (side // 14) ** 2 // 4
    return hf.Idefics3Processor(images, words, image_seq_len=tokens, chat_template=chat_templates.IDEFICS3)


# Gemma 3
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


def _gemma3_words() -> Any:
    return tiny_tokenizers.gemma(["<start_of_turn>", "<end_of_turn>"], _GEMMA)


def _gemma3(words: Any, side: int) -> Any:
    vision = hf.SiglipVisionConfig(**_tower(side), vision_use_head=False)
    text = hf.Gemma3TextConfig(**_text(words), query_pre_attn_scalar=_WIDTH // _HEADS, sliding_window=512)
    ids = {"image_token_index": "image_token", "boi_token_index": "boi_token", "eoi_token_index": "eoi_token"}
    tokens = {name: _id(words, _GEMMA[token]) for name, token in ids.items()}
    sizes = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": _gemma3_tokens(side)}
    return hf.Gemma3Config(**sizes, tie_word_embeddings=True, **tokens)


def _gemma3_tokens(side: int) -> int:
    return min(256, (side // 28) ** 2)


def _gemma3_processor(words: Any, side: int) -> Any:
    images = hf.Gemma3ImageProcessor(size={"height": side, "width": side})
    tokens = _gemma3_tokens(side)
    return hf.Gemma3Processor(images, words, chat_template=chat_templates.GEMMA3, image_seq_length=tokens)


# BLIP-2 (no chat template)
def _blip2_words() -> Any:
    return tiny_tokenizers.byte_level(("<pad>", "</s>", "<image>"), "</s>", eos_token="</s>", pad_token="<pad>")


def _blip2(words: Any, side: int) -> Any:
    text = hf.OPTConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        word_embed_proj_dim=_WIDTH,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        max_position_embeddings=2048,
        init_std=_DEVIATION,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    sizes = {"hidden_size": _WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": _HEADS}
    image = {"num_query_tokens": 4, "image_token_index": _id(words, "<image>")}
    return hf.Blip2Config(vision_config=_tower(side), qformer_config=sizes, text_config=text, **image)


def _blip2_processor(words: Any, side: int) -> Any:
    images = hf.BlipImageProcessor(size={"height": side, "width": side})
    return hf.Blip2Processor(images, words, num_query_tokens=4)


_QWEN2 = _qwen_processor(chat_templates.QWEN2_VL, 2)
_QWEN25 = _qwen_processor(chat_templates.QWEN2_VL, 25)
_QWEN3 = _qwen_processor(chat_templates.QWEN3_VL, 3)
_QWEN3_THINKING = _qwen_processor(chat_templates.QWEN3_VL_THINKING, 3)
ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2_vl": Architecture(_qwen_words, _qwen2_vl, _QWEN2, 140, 3584),
    "qwen2_5_vl": Architecture(_qwen_words, _qwen2_5_vl, _QWEN25, 140, 3584),
    "qwen3_vl": Architecture(_qwen_words, _qwen3_vl, _QWEN3, 160, 4096),
    "qwen3_vl_thinking": Architecture(_qwen_words, _qwen3_vl, _QWEN3_THINKING, 160, 4096),
    "llava": Architecture(_llava_words, _llava, _llava_processor, 56, 336),
    "llava_next": Architecture(_llava_words, _llava_next, _llava_next_processor, 56, 336),
    "pixtral": Architecture(_pixtral_words, _pixtral, _pixtral_processor, 96, 1024),
    "internvl": Architecture(_internvl_words, _internvl, _internvl_processor, 56, 448),
    "idefics3": Architecture(_idefics3_words, _idefics3, _idefics3_processor, 56, 364),
    "gemma3": Architecture(_gemma3_words, _gemma3, _gemma3_processor, 56, 896),
    "blip2": Architecture(_blip2_words, _blip2, _blip2_processor, 56, 224),
}
