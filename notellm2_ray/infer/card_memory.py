"""The memory of an engine that has a share of a GPU.

By default vLLM charges an engine with all memory that the card loses while the model is loaded, whoever takes it. With
a given size of the key-value cache it measures nothing, so that what neighbours do does not matter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from notellm2_ray.core.cards import USED
from notellm2_ray.core.errors import ConfigError, ModelError
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer.model_facts import ModelFacts, read_config

# CUDA graphs, the workspaces of libraries, and the activations of an image.
_FIXED = 3 * 2**29
_GIB = 2**30
_FLOATS = {"F64", "F32", "F16", "BF16"}


def card_share(settings: GenerationSettings) -> float:
    """The share of a GPU's memory that an engine takes: as set, or nine tenths of the share that it reserves.

    Raises:
        ConfigError: more is set than is reserved.
    """
    reserved = min(1.0, settings.gpus_per_engine)
    if settings.gpu_memory is None:
        return round(USED * reserved, 4)
    if settings.gpu_memory > reserved:
        raise ConfigError(
            f"generation.gpu_memory={settings.gpu_memory:g} is more than the {reserved:g} of a GPU that an engine "
            "reserves: the others on that GPU would find no memory. Leave generation.gpu_memory null, or reserve more "
            "(generation.gpus_per_engine; in the service serve.ranker.gpus or serve.preferences.gpus)"
        )
    return settings.gpu_memory


def arguments_on_card(
    facts: ModelFacts, settings: GenerationSettings, arguments: Mapping[str, Any], *, offline: bool
) -> dict[str, Any]:
    """The arguments of an engine, completed by what depends on the GPU that this process sees.

    Args:
        arguments: from :func:`~notellm2_ray.infer.engine.engine_arguments`.
        offline: whether only throughput counts: vLLM then takes 8,192 or 16,384 tokens a step, depending on the card.
            Its own default for such an engine would be 2,048.

    Raises:
        ModelError: the share of the card has no room for the model.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    steps, _ = EngineArgs.get_batch_defaults(settings.tensor_parallel)
    most = steps[UsageContext.LLM_CLASS if offline else UsageContext.OPENAI_API_SERVER]
    whole = arguments["max_num_seqs"] * arguments["max_model_len"]
    made = {"max_num_batched_tokens": min(most, whole), **arguments}
    measured = settings.gpus_per_engine >= 1 or "kv_cache_memory_bytes" in made
    weights = None if measured else weight_bytes(facts.model, settings.dtype)
    if weights is not None:
        _, config = read_config(facts.model)
        card = current_platform.get_device_total_memory()
        made["kv_cache_memory_bytes"] = cache_bytes(facts.model, config, weights, made, card)
    return made


def cache_bytes(name: str, config: Mapping[str, Any], weights: int, arguments: Mapping[str, Any], card: int) -> int:
    """Bytes of the key-value cache of an engine: its part of the card less weights and activations.

    A step's activations are about six rows of hidden size and three of the feed-forward's for each token, and the
    logits of each sequence twice, in float32.

    Args:
        name: of the model, for the message.
        config: the model's own.
        weights: bytes of the weights on the card.
        arguments: of the engine, with ``gpu_memory_utilization``, ``max_num_batched_tokens`` and ``max_num_seqs``.
        card: bytes of the card.

    Raises:
        ModelError: nothing is left for the cache.
    """
    text = config.get("text_config") or config.get("llm_config") or config
    hidden, inner = text.get("hidden_size") or 4096, text.get("intermediate_size") or 0
    inner = inner or 4 * hidden
    vocabulary = text.get("vocab_size") or config.get("vocab_size") or 150_000
    width = 4 if arguments["dtype"] == "float32" else 2
    step = arguments["max_num_batched_tokens"] * width * (6 * hidden + 3 * inner)
    logits = arguments["max_num_seqs"] * 8 * vocabulary
    share = arguments["gpu_memory_utilization"]
    left = int(share * card) - weights - step - logits - _FIXED
    if left <= 0:
        needed = weights + step + logits + _FIXED + _GIB
        raise ModelError(
            f"{name}: {share:.2g} of a GPU with {card / _GIB:.0f} GiB is too little for an engine: weights take "
            f"{weights / _GIB:.1f} GiB, a step {(step + logits) / _GIB:.1f} GiB. Reserve {needed / card / USED:.2f} "
            "of the GPU or more (generation.gpus_per_engine; in the service serve.ranker.gpus, serve.preferences.gpus)"
        )
    return left


def weight_bytes(model: str, dtype: str) -> int | None:
    """Bytes that a model's weights take on the card; None if they cannot be known before they are loaded.

    Args:
        model: directory or hub name.
        dtype: as in ``generation.dtype``; quantised weights keep their own.
    """
    width = 32 if dtype == "float32" else 16
    tensors = _tensors(model)
    bits = sum(count * (width if kind in _FLOATS else _bits(kind)) for kind, count in tensors)
    return bits // 8 or None


def _tensors(model: str) -> Iterable[tuple[str, int]]:
    """Type and number of elements of each tensor."""
    if Path(model).is_dir():
        headers = [_header(file) for file in Path(model).glob("*.safetensors")]
        return [(one["dtype"], math.prod(one["shape"])) for header in headers for one in header.values()]
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        return list(get_safetensors_metadata(model).parameter_count.items())
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError):
        return []


def _header(file: Path) -> dict[str, Any]:
    """Description of each tensor in a safetensors file: its first bytes are a length and then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _bits(kind: str) -> int:
    """Of an element, as in ``I32`` and ``F8_E4M3``."""
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8
