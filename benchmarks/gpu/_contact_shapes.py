"""What the parts of first_contact.py run on: networks of real sizes with random weights, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from embedder import CLOSING, MARK, OPENING, Setup, tiny_size
from transformers import Qwen2Config, Qwen3Config, Qwen3VLConfig

from notellm2_ray.core.settings import ModelSettings
from notellm2_ray.models.embedder.architectures import clip_vit_b
from notellm2_ray.models.embedder.preprocess import NoteBatch
from notellm2_ray.train.batches import PreparedNotes


class Record(NamedTuple):
    """One line of the table."""

    what: str
    value: float | None = None
    unit: str = ""
    flops: float | None = None  # a second, for shares of the card's rates
    peak_gib: float | None = None
    goal: float | None = None  # of the share of the measured product, or of ``value`` where there are no flops
    note: str = ""


def size(name: str, tiny: bool) -> str:
    """How a network is called in the table."""
    return f"tiny for {name}" if tiny else f"{name} shape"


def device_of(tiny: bool) -> torch.device:
    return torch.device("cpu" if tiny else "cuda")


def small(tiny: bool) -> Setup:
    """A Qwen3-0.6B with CLIP ViT-B/16."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return _setup(tiny, config)


def middle(tiny: bool) -> Setup:
    """A Qwen2.5-3B with CLIP ViT-B/16."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return _setup(tiny, config)


def qwen3_vl_2b(tiny: bool) -> Qwen3VLConfig:
    """A Qwen3-VL-2B, or one with the same parts that a CPU runs in a moment."""
    text: dict[str, Any] = {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }
    vision: dict[str, Any] = {
        "depth": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    if tiny:
        text |= {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
        vision |= {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
        vision["deepstack_visual_indexes"] = [0, 1]
    own = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 1, "vision_end_token_id": 2}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **own)


def prepared(setup: Setup, notes: int, groups: int, seed: int) -> PreparedNotes:
    """Random notes of lengths as texts have them, in ``groups`` of similar length, as training prepares them.

    Lengths are log-normal around 110 tokens, cut at the longest prompt: few are full.
    """
    draw = np.random.default_rng(seed)
    least = OPENING + setup.settings.qformer.num_queries + CLOSING + MARK + CLOSING
    middle = min(110, (least + setup.num_tokens) // 2)
    lengths = np.clip(draw.lognormal(np.log(middle), 0.4, notes), least, setup.num_tokens).astype(int)
    parts = np.array_split(np.argsort(lengths, kind="stable"), groups)
    order = np.concatenate(parts)
    positions = torch.empty(notes, dtype=torch.long)
    positions[torch.from_numpy(order)] = torch.arange(notes)
    made = [_batch(setup, lengths[part], seed + number) for number, part in enumerate(parts)]
    return PreparedNotes([str(row) for row in range(notes)], made, [len(part) for part in parts], positions)


def lengths_of(notes: PreparedNotes) -> list[int]:
    """Tokens of each note, in the order of the groups."""
    return [int(length) for batch in notes.groups for length in batch.attention_mask.sum(1)]


def save_models(directory: Path, setup: Setup) -> tuple[str, str]:
    """The LLM and the vision encoder as Hugging Face directories with random weights, and the packaged tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

    import notellm2_ray

    packaged = Path(notellm2_ray.__file__).parent / "models" / "checkpoints" / "llm"
    torch.manual_seed(0)
    llm, vision = directory / "llm", directory / "vision"
    # A checkpoint of another vocabulary than the tokenizer's is enlarged by the package.
    AutoModelForCausalLM.from_config(setup.llm, dtype=torch.bfloat16).save_pretrained(llm)
    AutoTokenizer.from_pretrained(packaged).save_pretrained(llm)
    CLIPVisionModel(setup.vision).to(torch.bfloat16).save_pretrained(vision)
    side = setup.vision.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(vision)
    return str(llm), str(vision)


def _setup(tiny: bool, llm: Any) -> Setup:
    if tiny:
        return tiny_size()
    settings = ModelSettings(variant="notellm2")
    body = settings.max_body_tokens - 1 + settings.qformer.num_queries
    tokens = body + OPENING + CLOSING + MARK + CLOSING
    return Setup(
        settings=settings,
        llm=llm,
        llm_trained=llm,
        vision=clip_vit_b(),
        num_tokens=tokens,
        embed_notes=[256],
        train_pairs=[64],
        train_steps=5,
        matrix=8192,
        device=torch.device("cuda"),
    )


def _batch(setup: Setup, lengths: np.ndarray, seed: int) -> NoteBatch:
    draw = torch.Generator().manual_seed(seed)
    count, longest, side = len(lengths), int(lengths.max()), setup.vision.image_size
    queries = setup.settings.qformer.num_queries
    batch = NoteBatch(
        input_ids=torch.randint(0, setup.llm.vocab_size, (count, longest), generator=draw),
        attention_mask=(torch.arange(longest) < torch.from_numpy(lengths)[:, None]).long(),
        last=torch.from_numpy(lengths) - 1,
        pixels=torch.randint(0, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8),
        image_rows=torch.arange(count),
        image_starts=torch.full((count,), OPENING),
        visual_ends=torch.full((count,), OPENING + queries + CLOSING - 1),
    )
    return batch.pin_memory() if setup.device.type == "cuda" else batch
