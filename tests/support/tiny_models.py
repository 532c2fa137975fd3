"""Tiny random models in Hugging Face's own formats, made in a moment: for tests of what goes on around the weights."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AddedToken,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from notellm2_ray.core.prompts import note_prompt
from notellm2_ray.core.schema import NOTE_SCHEMA, Note
from notellm2_ray.core.settings import ModelSettings, QFormerSettings

LLMS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
WORDS = "red round cat sleeps on the blue sofa 猫 在 沙发 上 睡觉 红色 圆形 旅行 美食 a small green house by sea"


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the prompts' words, with marks like those of chat models."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    prompts = [part for lang in ("zh", "en") for part in note_prompt("micl", lang) if isinstance(part, str)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*prompts, WORDS] * 5, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe)
    made.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    made.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<think>", special=False)])
    return made


def save_llm(directory: Path, kind: str = "qwen2") -> str:
    """A causal LM of two layers and its tokenizer."""
    words = tokenizer()
    config_class, model_class = LLMS[kind]
    config = config_class(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        head_dim=16,
        initializer_range=0.1,  # at this width 0.02 lets next to nothing through a layer
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    torch.manual_seed(0)
    model_class(config).save_pretrained(directory)
    words.save_pretrained(directory)
    return str(directory)


_TOWER = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


def save_clip(directory: Path) -> str:
    """A whole CLIP of two layers, 32 pixels, 16 patches, and its image processor."""
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=50)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=_TOWER, projection_dim=8))
    with torch.no_grad():  # at its own initialisation a tiny CLIP hardly sees any difference between images
        model.vision_model.embeddings.patch_embedding.weight.normal_(0, 0.2)
    model.save_pretrained(directory)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)
    return str(directory)


def save_siglip(directory: Path) -> str:
    """The vision half of a SigLIP of two layers and its image processor."""
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**_TOWER)).save_pretrained(directory)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return str(directory)


def save_dinov2(directory: Path) -> str:
    """A DINOv2 of two layers. As of published ones, its positions are for larger images than its processor makes."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in _TOWER.items() if key != "intermediate_size"} | {"image_size": 48}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(directory)
    crop = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 36}, crop_size=crop).save_pretrained(directory)
    return str(directory)


def settings(variant: str = "notellm2", **changes: object) -> ModelSettings:
    """Settings to go with these models."""
    qformer = QFormerSettings(
        num_layers=2, num_heads=2, hidden_size=16, intermediate_size=32, num_queries=4, dropout=0.0
    )
    return ModelSettings(variant=variant, qformer=qformer, **{"embedding_dim": 16, **changes})


def picture(seed: int, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """An encoded image of four random patches of colour."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


def notes(num: int, *, without_image: Sequence[int] = ()) -> list[Note]:
    """Notes of growing text, in Chinese and English, each with its own picture."""
    words = WORDS.split()
    return [
        Note(
            f"n{i}",
            f"red cat {i}",
            (words[i % len(words)],),
            " ".join(words[: 3 * i]),
            None if i in without_image else picture(i),
        )
        for i in range(num)
    ]


def write_notes(path: Path, notes: Sequence[Note], row_group_size: int = 1000) -> Path:
    """Notes as a prepared Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**note._asdict(), "created_at": None} for note in notes]
    pq.write_table(pa.Table.from_pylist(rows, schema=NOTE_SCHEMA), path, row_group_size=row_group_size)
    return path
