"""The networks of the paper's Table 9 as Hugging Face configurations: to count parameters, or measure speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from notellm2_ray.core.settings.model import ModelSettings, QFormerSettings, VariantName


def tomato() -> PretrainedConfig:
    """Tomato: LLaMA-2 7B with a vocabulary of 49,216."""
    return LlamaConfig(
        vocab_size=49_216,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )


def qwen_chat() -> PretrainedConfig:
    """Qwen-7B-Chat as a Qwen2, which has the same architecture.

    Table 9 prints an intermediate size of 22,016: Qwen-7B's configuration adds up the two projections of its gated
    feed-forward, of 11,008 each.
    """
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
    )


def clip_vit_b() -> PretrainedConfig:
    """CLIP ViT-B/16: 196 patches of a 224-pixel image."""
    return CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )


def openclip_bigg() -> PretrainedConfig:
    """OpenCLIP ViT-bigG/14: 256 patches of a 224-pixel image."""
    return CLIPVisionConfig(
        hidden_size=1664,
        intermediate_size=8192,
        num_hidden_layers=48,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )


class Architecture(NamedTuple):
    """An embedder of Table 9."""

    llm: Callable[[], PretrainedConfig]
    vision: Callable[[], PretrainedConfig]
    qformer_width: int

    def settings(self, variant: VariantName = "notellm2") -> ModelSettings:
        """Model settings of one of its variants."""
        return ModelSettings(variant=variant, qformer=QFormerSettings(hidden_size=self.qformer_width))


ARCHITECTURES: Mapping[str, Architecture] = {
    "mtomato-base": Architecture(tomato, clip_vit_b, 768),
    "mqwen-base": Architecture(qwen_chat, clip_vit_b, 768),
    "mqwen-bigg": Architecture(qwen_chat, openclip_bigg, 1536),
}
