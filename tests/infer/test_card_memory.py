"""Engines that share a GPU: what each takes of it follows what it reserves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from notellm2_ray.core.errors import ConfigError, ModelError
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer.card_memory import cache_bytes, card_share, weight_bytes
from notellm2_ray.infer.engine import engine_arguments
from notellm2_ray.infer.model_facts import ModelFacts

GIB = 2**30
QWEN_7B: dict[str, Any] = {"hidden_size": 3584, "intermediate_size": 18_944, "vocab_size": 152_064}
WEIGHTS_7B = 2 * 7_615_616_512


def arguments(gpus: float, **changes: Any) -> dict[str, Any]:
    facts = ModelFacts("m", "Qwen2ForCausalLM", False, 32_768, "f")
    made = engine_arguments(facts, GenerationSettings(gpus_per_engine=gpus, **changes))
    return {**made, "max_num_batched_tokens": 8192}


@pytest.mark.parametrize(("gpus", "used"), [(1, 0.9), (0.4, 0.36), (0.5, 0.45), (2, 0.9)])
def test_an_engine_takes_what_it_reserves(gpus: float, used: float) -> None:
    assert arguments(gpus)["gpu_memory_utilization"] == pytest.approx(used)


def test_more_than_is_reserved_is_refused() -> None:
    assert card_share(GenerationSettings(gpus_per_engine=0.4, gpu_memory=0.38)) == 0.38
    with pytest.raises(ConfigError, match=r"gpu_memory=0\.9 .*reserves.*serve\.ranker\.gpus"):
        card_share(GenerationSettings(gpus_per_engine=0.4, gpu_memory=0.9))


@pytest.mark.parametrize(("card", "gpus"), [(80, 0.4), (80, 0.5), (141, 0.3), (48, 0.5)])
def test_engines_that_fill_a_card_by_their_shares_fit_on_it(card: int, gpus: float) -> None:
    made = arguments(gpus)
    cache = cache_bytes("m", QWEN_7B, WEIGHTS_7B, made, card * GIB)
    # At least one prompt of 2,048 tokens fits: 28 layers, 4 heads of 128 numbers, keys and values.
    assert cache > 2048 * 28 * 2 * 4 * 128 * 2
    engines = int(1 / gpus)
    assert engines * (cache + WEIGHTS_7B) < 0.9 * engines * gpus * card * GIB  # activations and graphs have the rest


def test_a_share_without_room_says_how_much_is_needed() -> None:
    with pytest.raises(ModelError, match=r"0\.22 of a GPU with 24 GiB.*weights take 14\.2 GiB.*Reserve 0\.\d+ of"):
        cache_bytes("m", QWEN_7B, WEIGHTS_7B, arguments(0.24), 24 * GIB)


def test_bytes_of_weights_are_read_from_headers(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(10, 4),
        "b": torch.zeros(6).bfloat16(),
        "q": torch.zeros(8, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weight_bytes(str(tmp_path), "auto") == 2 * 46 + 8
    assert weight_bytes(str(tmp_path), "float32") == 4 * 46 + 8
    (tmp_path / "empty").mkdir()
    assert weight_bytes(str(tmp_path / "empty"), "auto") is None


@pytest.mark.slow  # vLLM is imported
@pytest.mark.parametrize(("gpus", "offline", "cached"), [(0.5, True, True), (1, True, False), (1, False, False)])
def test_arguments_of_a_given_card(
    gpus: float, offline: bool, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    from notellm2_ray.infer.card_memory import arguments_on_card

    save_file({"w": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**QWEN_7B, "architectures": ["Qwen2ForCausalLM"]}))
    monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *_: 80 * GIB)
    monkeypatch.setattr(type(current_platform), "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda *_: False)
    facts = ModelFacts(str(tmp_path), "Qwen2ForCausalLM", False, 32_768, "f")
    settings = GenerationSettings(gpus_per_engine=gpus)
    made = arguments_on_card(facts, settings, engine_arguments(facts, settings), offline=offline)
    assert made["max_num_batched_tokens"] == (16_384 if offline else 8192)
    assert ("kv_cache_memory_bytes" in made) == cached
    own = {"max_num_batched_tokens": 1024}
    chosen = arguments_on_card(facts, settings, {**engine_arguments(facts, settings), **own}, offline=offline)
    assert chosen["max_num_batched_tokens"] == 1024
