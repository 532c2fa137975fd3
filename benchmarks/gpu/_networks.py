"""The recommender's full-size networks as Hugging Face configurations, to be built with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlavaNextConfig, MistralConfig, PretrainedConfig, Qwen2VLConfig

IMAGE_TOKEN = 3  # instead of each network's own image token


class Mllm(NamedTuple):
    """An image-text model, and its input for one square image."""

    config: Callable[[], PretrainedConfig]
    image_tokens: int
    vision: Callable[[int], dict[str, torch.Tensor]]  # number of images to what the vision tower takes


def llava_next_mistral_7b() -> PretrainedConfig:
    """LLaVA-v1.6-Mistral-7B, which the paper tunes, and summarises images with."""
    text = MistralConfig(
        vocab_size=32_064, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    return LlavaNextConfig(text_config=text.to_dict(), image_token_index=IMAGE_TOKEN)


def qwen2_vl_7b() -> PretrainedConfig:
    return _qwen2_vl(3584, 18_944, heads=28, keys=4, sections=[16, 24, 24], vocabulary=152_064)


def qwen2_vl_2b() -> PretrainedConfig:
    return _qwen2_vl(1536, 8960, heads=12, keys=2, sections=[16, 24, 24], vocabulary=151_936, tied=True)


def llama_3_8b() -> PretrainedConfig:
    """Llama-3-8B-Instruct, which the paper states tastes with."""
    return LlamaConfig(
        vocab_size=128_256,
        intermediate_size=14_336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )


def tiny_mllm() -> PretrainedConfig:
    """A Qwen2-VL that a CPU runs in a moment."""
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
    return _qwen2_vl(64, 128, heads=4, keys=2, sections=[2, 3, 3], vocabulary=1000, layers=2, vision=vision)


def tiny_llm() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )


def _qwen2_vl(
    width: int,
    inner: int,
    *,
    heads: int,
    keys: int,
    sections: list[int],
    vocabulary: int,
    tied: bool = False,
    layers: int = 28,
    vision: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    }
    own = {"image_token_id": IMAGE_TOKEN, "video_token_id": 4, "vision_start_token_id": 1, "vision_end_token_id": 2}
    tower = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": width}
    return Qwen2VLConfig(text_config=text, vision_config=dict(vision or tower), tie_word_embeddings=tied, **own)


def _qwen2_vl_images(side: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """Images of ``side`` x ``side`` patches of 14 x 14 pixels, in two frames of three colours."""

    def images(count: int) -> dict[str, torch.Tensor]:
        patches = torch.randn(count * side * side, 3 * 2 * 14 * 14)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]] * count)}

    return images


def _llava_next_images(count: int) -> dict[str, torch.Tensor]:
    """Images of 512 x 512 pixels: two by two tiles of 336, and the whole image as a fifth tile."""
    return {"pixel_values": torch.randn(count, 5, 3, 336, 336), "image_sizes": torch.tensor([[512, 512]] * count)}


MLLMS: Mapping[str, Mllm] = {
    # 24 x 24 patches of the whole image, 48 x 48 of its tiles, and a token after each line of tiles' patches.
    "llava-next-mistral-7b": Mllm(llava_next_mistral_7b, 24 * 24 + 48 * 49, _llava_next_images),
    "qwen2-vl-7b": Mllm(qwen2_vl_7b, 18 * 18, _qwen2_vl_images(36)),  # 504 x 504 pixels, four patches a token
    "qwen2-vl-2b": Mllm(qwen2_vl_2b, 18 * 18, _qwen2_vl_images(36)),
    "tiny": Mllm(tiny_mllm, 2 * 2, _qwen2_vl_images(4)),
}
LLMS: Mapping[str, Callable[[], PretrainedConfig]] = {"llama-3-8b": llama_3_8b, "tiny": tiny_llm}
