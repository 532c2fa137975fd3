"""Presets: the CPU demo, the real data sets, and the papers' own settings.

A preset is a nested mapping that replaces defaults. A YAML file (``preset: NAME`` at its top) and then ``key=value``
override it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from notellm2_ray.baselines.ranking.table import RANKING_BASELINES
from notellm2_ray.baselines.recall.table import RECALL_BASELINES
from notellm2_ray.core.config import apply_overrides, build, load_yaml, merge
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import Settings

# Sizes that two CPU cores train in minutes.
_LAPTOP: dict[str, Any] = {
    "model": {
        "llm": "tiny",
        "vision": "tiny",
        "prompt_language": "en",
        "attention": "eager",  # faster than sdpa for a model this small on a CPU
        "qformer": {"num_layers": 2, "num_heads": 4, "hidden_size": 128, "intermediate_size": 256, "num_queries": 8},
    },
    "train": {
        "zero_stage": 1,
        "cpus_per_worker": 2,
        "batch_pairs": 32,
        "epochs": 2,
        "precision": "auto",
        "validate_every_steps": 50,
        "checkpoint_every_steps": 50,
        "max_validation_pairs": 500,
    },
    "embed": {"cpus_per_actor": 2, "chunk_rows": 512, "by_modality": True},
    "evaluate": {"cutoffs": [10, 100, 1000, 10000]},
    # Five blocks a user. Each block is one call of the tiny LLM, which answers a few dozen a second.
    "sequences": {"max_events": 16},
    # One example per training user would be too few for a model this small.
    "candidates": {"train_targets": "every_block"},
    # float32, because lower precision gives many candidates equal scores.
    "generation": {"dtype": "float32", "max_model_len": 1024, "max_sequences": 64},
    "summaries": {"max_tokens": 40},
    "preferences": {"max_tokens": 64},
    "tune": {
        "zero_stage": 2,
        "batch_size": 32,
        "epochs": 2,
        "learning_rate": 2e-3,
        "lora_rank": 16,
        "lora_dropout": 0.0,
        "validate_every_steps": 100,
        "checkpoint_every_steps": 50,
        "max_validation_examples": 30,
    },
}

# Table 9's base connector and Table 8's optimisation; the published runs used 8 GPUs with 16 pairs each, ZeRO-3, and
# parameters and optimizer state offloaded to the CPU. Offload is left out: of seven billion parameters a rank of eight
# holds 15 GB, and an update on the CPU takes many times as long.
_PAPER: dict[str, Any] = {
    "model": {
        "variant": "notellm2",
        "vision": "openai/clip-vit-base-patch16",
        "prompt_language": "zh",
        "qformer": {"num_layers": 6, "num_heads": 12, "hidden_size": 768, "intermediate_size": 3072, "num_queries": 16},
    },
    "train": {
        "engine": "deepspeed",
        "zero_stage": 3,
        "num_workers": 8,
        "cpus_per_worker": 4,
        "gpus_per_worker": 1,
        "batch_pairs": 128,
        "epochs": 1,
        "learning_rate": 3e-6,
        "weight_decay": 1e-3,
        "warmup_ratio": 0.1,
        "precision": "bf16",
        "validate_every_steps": 1750,
    },
    "embed": {"gpus_per_actor": 1, "cpus_per_actor": 4, "actors": 8, "precision": "bf16", "batch_tokens": 65_536},
    "evaluate": {"seeds": [42, 43, 44], "cutoffs": [100, 1000, 10000]},
}

# The world's feed shows new notes: nine of ten clicks are on notes at most four days old. With older negatives, the
# newest candidate would be the target in nine of ten cases.
_WORLD: dict[str, Any] = merge(_LAPTOP, {"candidates": {"max_negative_age_days": 4}})

# Pretrained models come with the package. The embedder, its connector and the recommender's adapter are trained.
_QUICK: dict[str, Any] = {
    "model": {"llm": "packaged", "vision": "packaged"},
    "summaries": {"model": "packaged"},
    "preferences": {"model": "packaged"},
    "ranker": {"model": "packaged"},
    "train": {"epochs": 1, "max_steps": 64, "validate_every_steps": 32},
    "evaluate": {"embedders": ["basic", "notellm2"]},
    "sequences": {"max_events": 10},
    "tune": {"epochs": 1, "validate_every_steps": 40},
    "ranking": {"baselines": ["random", "popularity", "newest", "gru4rec", "sasrec"]},
}

# Every seed trains tiny models of its own, and so the deviations are those of all that is random.
_FULL: dict[str, Any] = {
    "workspace": "runs/world-full",
    "evaluate": {"embedders": ["basic", "notellm2", "text_only", "image_only"], "seeds": [42, 43, 44]},
    "ranking": {
        "seeds": [42, 43, 44],
        "rankers": ["mllm_msr", "direct", "no_image_summary", "tallrec"],
        "baselines": [
            *("random", "popularity", "newest", "gru4rec", "sasrec", "gru4rec_image", "gru4rec_summary", "untuned")
        ],
    },
}

PRESETS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "demo": ("the synthetic world with packaged tiny models, minutes on two CPU cores", merge(_WORLD, _QUICK)),
    "demo-full": (
        "the same world, all variants, three seeds with tiny models of their own; hours on two CPU cores",
        merge(_WORLD, _FULL),
    ),
    "demo-by-time": (
        "demo-full with the recommender's targets split by time",
        merge(merge(_WORLD, _FULL), {"workspace": "runs/world-by-time", "candidates": {"split_by": "time"}}),
    ),
    "laptop": (
        "your own tables with tiny models that are trained on them, on two CPU cores",
        merge(_LAPTOP, {"workspace": "runs/laptop"}),
    ),
    "movielens": (
        "MovieLens with posters and tiny models; set source.directory",
        merge(
            _LAPTOP,
            {
                "workspace": "runs/movielens",
                "source": {"kind": "movielens"},
                "split": {"by": "notes"},
                "pairs": {"window_days": None},
                "train": {"epochs": 1},
            },
        ),
    ),
    "microlens": (
        "MicroLens titles and tiny models, text only; set source.pairs and source.titles",
        merge(
            _LAPTOP,
            {
                "workspace": "runs/microlens",
                "source": {"kind": "microlens"},
                "split": {"by": "notes"},
                "pairs": {"window_days": None},
                "train": {"epochs": 1},
                "model": {"variant": "text_only"},
                "evaluate": {"embedders": ["text_only"], "inputs": ["text"]},
                # There are no images: preferences are made from titles, and candidates shown by their titles.
                "preferences": {"variant": "no_image_summary"},
                "ranker": {"variant": "no_image_summary"},
                "ranking": {
                    "rankers": ["no_image_summary", "tallrec"],
                    "controls": ["other_preference"],
                    "baselines": ["random", "popularity", "gru4rec", "sasrec", "untuned_text"],
                },
                "candidates": {"train_targets": "last", "max_test_users": 200},
                "tune": {"epochs": 1},
            },
        ),
    ),
    # Tomato is Xiaohongshu's LLaMA-2 with further pretraining. It is not public; the published code uses LLaMA-2.
    "mtomato-base": (
        "the paper's MTomato-Base, with LLaMA-2-7B instead of Tomato",
        merge(_PAPER, {"model": {"llm": "meta-llama/Llama-2-7b-hf"}}),
    ),
    # The first Qwen-Chat needs code from its own repository; Qwen1.5 is the closest model in transformers.
    "mqwen-base": ("the paper's MQwen-Base", merge(_PAPER, {"model": {"llm": "Qwen/Qwen1.5-7B-Chat"}})),
    "mqwen-bigg": (
        "the paper's MQwen-bigG: OpenCLIP ViT-bigG and a wider connector",
        merge(
            _PAPER,
            {
                "model": {
                    "llm": "Qwen/Qwen1.5-7B-Chat",
                    "vision": "openclip:ViT-bigG-14:laion2b_s39b_b160k",
                    "qformer": {"hidden_size": 1536},
                }
            },
        ),
    ),
}


def preset(name: str) -> dict[str, Any]:
    """The mapping of a preset.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if name not in PRESETS:
        listing = "\n".join(f"  {known:14s} {text}" for known, (text, _) in PRESETS.items())
        raise ConfigError(f"unknown preset {name!r}; the presets are\n{listing}")
    return PRESETS[name][1]


def load_settings(config: str | None, preset_name: str | None, overrides: Sequence[str]) -> Settings:
    """Settings from the defaults, the preset, the YAML file and the overrides; later ones win.

    Raises:
        ConfigError: a key or value is wrong (the message names all of them), or a baseline is unknown.
    """
    values = load_yaml(config) if config else {}
    name = preset_name or values.pop("preset", None)
    values.pop("preset", None)
    base: dict[str, Any] = preset(name) if name else {}
    settings: Settings = build(Settings, apply_overrides(merge(base, values), overrides))
    RECALL_BASELINES.check("evaluate.baselines", settings.evaluate.baselines)
    RANKING_BASELINES.check("ranking.baselines", settings.ranking.baselines)
    return settings
