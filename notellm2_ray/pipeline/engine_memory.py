"""The memory that a vLLM engine needs on each GPU, for ``--dry-run``: weights and cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from notellm2_ray.core.errors import NoteLLMError, first_line
from notellm2_ray.core.settings import Settings
from notellm2_ray.infer.card_memory import cache_bytes, card_share, weight_bytes
from notellm2_ray.infer.model_facts import read_config
from notellm2_ray.pipeline import ranking_outputs
from notellm2_ray.pipeline.cards import CARDS, card_of, require_at_hand, size_of

_GIB = 2**30


def engine_memory(settings: Settings, model: str) -> list[str]:
    """Lines on the vLLM engines of a model."""
    engine, path = settings.generation, ranking_outputs.ranking_model(settings, model)
    if model == "tiny":
        return []  # there may be none yet, and it fits anywhere
    try:
        require_at_hand(path)
        name, config = read_config(path)
        weights = weight_bytes(path, engine.dtype)
        share = card_share(engine) if engine.gpus_per_engine else None
    except (NoteLLMError, OSError) as error:
        return [f"memory of an engine with {model}: not foretold, {first_line(error)}"]
    if weights is None:
        return [f"memory of an engine with {model}: not foretold, its weights are not safetensors"]
    weights //= engine.tensor_parallel
    each = cache_bytes_per_token(config, 4 if engine.dtype == "float32" else 2) // engine.tensor_parallel
    prompt = each * engine.max_model_len
    title = f"memory of an engine with {model}{', of each GPU' if share else ''}"
    cache = f"{size_of(prompt)} of cache for a prompt of {engine.max_model_len:,} tokens"
    many = f"{size_of(prompt * engine.max_sequences)} for generation.max_sequences={engine.max_sequences} of them"
    lines = [f"{title}: weights {size_of(weights)}, {cache}, {many}"]
    if share is None:
        if prompt > engine.cpu_cache_gb * _GIB:
            lines.append(f"  does NOT fit into generation.cpu_cache_gb={engine.cpu_cache_gb}: raise it")
        return lines
    return [*lines, *_engine_verdict(settings, name, config, weights, prompt, share)]


def _engine_verdict(
    settings: Settings, name: str, config: Mapping[str, Any], weights: int, prompt: int, share: float
) -> list[str]:
    engine = settings.generation
    arguments = {
        "dtype": engine.dtype,
        "gpu_memory_utilization": share,
        "max_num_batched_tokens": min(8192, engine.max_sequences * engine.max_model_len),
        "max_num_seqs": engine.max_sequences,
    }
    card, least, error = card_of(settings), None, ""
    for size in CARDS if card is None else (card,):
        try:
            left = cache_bytes(name, config, weights, arguments, int(size * _GIB))
        except NoteLLMError as refused:
            error = str(refused)
            continue
        if left >= prompt:
            least = size, left
            break
        error = f"only {size_of(left)} are left for the cache: lower generation.max_model_len"
    if least is None:
        where = f"a GPU of {card:.0f} GiB" if card else f"any GPU of up to {CARDS[-1]} GiB"
        return [f"  does NOT fit into {share:g} of {where}: {error}", "  or raise generation.tensor_parallel"]
    size, left = least
    more = "" if card else " or more (ray.gpu_memory_gb names yours)"
    room = f"with {size_of(left)} of cache, for {left // prompt} such prompts at once"
    return [f"  fits into {share:g} of a GPU of {size:.0f} GiB{more}, {room}"]


def cache_bytes_per_token(config: Mapping[str, Any], width: int) -> int:
    """Bytes of a token's keys and values in all layers, of a decoder without sliding windows or latent attention."""
    text = config.get("text_config") or config.get("llm_config") or config
    heads = text.get("num_attention_heads") or 32
    keys = text.get("num_key_value_heads") or heads
    size = text.get("head_dim") or (text.get("hidden_size") or 4096) // heads
    return 2 * (text.get("num_hidden_layers") or 32) * keys * size * width
